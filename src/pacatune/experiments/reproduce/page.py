"""The report: Markdown, and one HTML page that needs nothing else and explains itself."""

import html
import re
from collections.abc import Iterable, Sequence

from pacatune.experiments.paper import CITATION
from pacatune.experiments.reproduce.compare import RULE
from pacatune.experiments.reproduce.section import ReportTable, Section

__all__ = ["make_html", "make_markdown", "make_result"]

INTRODUCTION = (
    "Fine-tuning adapts a trained neural network to a task. Training all of its weights (Full-FT) "
    "takes several times the memory of using it, so methods were made that train few. LoRA, DoRA "
    "and MosLoRA put small trained matrices beside each frozen weight; PaCA (Partial Connection "
    "Adaptation) trains a few columns of the weights themselves and nothing else. The paper's "
    "claim is that this costs less memory and time at the same quality. Names that begin with Q "
    "are the same methods on weights of 4 bits.",
    f"This page puts what the paper reports ({CITATION}) beside what `pacatune` finds. Numbers are "
    "marked by where they come from: simulated (computed from the real code for the paper's own "
    "models and sizes, without running them), counted (exact, of a real step), or measured on the "
    "machine named below. Where the machine or the model is smaller than the paper's, shares are "
    "compared and not the numbers themselves.",
)
# Agreements are only counted.
_OUTCOMES = {
    "contradicts": "Contradicts the paper",
    "open": "Left open: the intervals overlap",
}
# Text is as wide as lines can be read, tables as wide as the window; names and numbers do not wrap.
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a202c; }
p, ul, figure { max-width: 60rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 3rem; border-top: 1px solid #cbd5e0;
  padding-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .4rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
td { white-space: nowrap; } th { background: #f7fafc; vertical-align: bottom; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
svg { max-width: 100%; height: auto; } .note { color: #4a5568; }
.contradicts { color: #9b2c2c; } code { background: #edf2f7; padding: 0 .2rem; }
"""


def make_markdown(sections: Sequence[Section], heading: str) -> str:
    """Return the report as Markdown; pictures are files `NAME-1.svg`, ... beside it.

    Args:
        sections: In order.
        heading: Of the report.
    """
    parts = [f"# {heading}", "", *_paragraphs(INTRODUCTION)]
    parts += [*_paragraphs([f"**What counts as a contradiction.** {RULE}"])]
    for section in sections:
        parts += _section_markdown(section)
    return "\n".join(parts).rstrip() + "\n"


def make_result(section: Section) -> str:
    """Return what a section found, as Markdown for a terminal: tables and what contradicts."""
    lines = [f"## {section.title}", ""]
    for table in section.tables:
        lines += [f"### {table.title}", "", *_table_markdown(table), ""]
        lines += _paragraphs([table.note] if table.note else [])
    lines += _paragraphs(_summary(section))
    lines += [f"- {v.text}." for v in section.verdicts if v.outcome == "contradicts"]
    return "\n".join(lines)


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]


def _section_markdown(section: Section) -> list[str]:
    lines = [f"## {section.title}", "", f"{section.place}.", "", *_paragraphs(section.about)]
    lines += _paragraphs(_summary(section))
    for table in section.tables:
        lines += [f"### {table.title}", "", *_table_markdown(table), ""]
        lines += _paragraphs([table.note] if table.note else [])
    for number, chart in enumerate(section.charts, 1):
        lines += [f"![{chart.caption}]({section.name}-{number}.svg)", ""]
    for outcome, title in _OUTCOMES.items():
        texts = [v.text for v in section.verdicts if v.outcome == outcome]
        if texts:
            lines += [f"### {title}", "", *(f"- {text}." for text in texts), ""]
    if section.notes:
        lines += ["### What limits the comparison", "", *(f"- {n}" for n in section.notes), ""]
    return [*lines, *_paragraphs([section.provenance] if section.provenance else [])]


def _summary(section: Section) -> list[str]:
    """Say in a sentence how many comparisons agree, and what is missing."""
    texts = []
    if section.verdicts:
        counts = section.outcomes()
        texts.append(
            f"**{counts['agrees']} comparisons agree with the paper, {counts['open']} are left "
            f"open, {counts['contradicts']} contradict it.**"
        )
    if section.missing:
        texts.append(f"Not computed yet: {', '.join(section.missing)}.")
    return texts


def _table_markdown(table: ReportTable) -> list[str]:
    right = ["---", "---", *["--:"] * (len(table.header) - 2)]
    return [
        f"| {' | '.join(table.header)} |",
        f"|{'|'.join(right)}|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]


def make_html(sections: Sequence[Section], heading: str) -> str:
    """Return the report as one page; pictures are inside, nothing is loaded from elsewhere."""
    body = [f"<h1>{_escape(heading)}</h1>", *(f"<p>{_inline(text)}</p>" for text in INTRODUCTION)]
    body.append(f"<p><b>What counts as a contradiction.</b> {_inline(RULE)}</p>")
    if len(sections) > 1:
        links = (f'<li><a href="#{s.name}">{_escape(s.title)}</a></li>' for s in sections)
        body.append(f"<ul>{''.join(links)}</ul>")
    for section in sections:
        body += _section_html(section)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(heading)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _section_html(section: Section) -> list[str]:
    parts = [f'<h2 id="{section.name}">{_escape(section.title)}</h2>']
    parts += [f"<p>{_inline(text)}</p>" for text in (f"{section.place}.", *section.about)]
    parts += [f"<p>{_inline(text)}</p>" for text in _summary(section)]
    for table in section.tables:
        parts.append(f"<h3>{_escape(table.title)}</h3>{_table_html(table)}")
        if table.note:
            parts.append(f'<p class="note">{_inline(table.note)}</p>')
    for number, chart in enumerate(section.charts, 1):
        # Several pictures on one page must not share the names that they use inside.
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{section.name}-{number}-", chart.svg)
        parts.append(f"<figure>{svg}<figcaption>{_inline(chart.caption)}</figcaption></figure>")
    for outcome, title in _OUTCOMES.items():
        texts = [v.text for v in section.verdicts if v.outcome == outcome]
        if texts:
            items = "".join(f"<li>{_inline(text)}.</li>" for text in texts)
            parts.append(f'<h3 class="{outcome}">{title}</h3><ul>{items}</ul>')
    if section.notes:
        items = "".join(f"<li>{_inline(note)}</li>" for note in section.notes)
        parts.append(f"<h3>What limits the comparison</h3><ul>{items}</ul>")
    if section.provenance:
        parts.append(f'<p class="note">{_inline(section.provenance)}</p>')
    return parts


def _table_html(table: ReportTable) -> str:
    head = "".join(f"<th>{_escape(text)}</th>" for text in table.header)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_escape(text)}</td>' for text in row)}</tr>" for row in table.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _inline(text: str) -> str:
    """Escape a text and set its `code` and **bold** words."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)
