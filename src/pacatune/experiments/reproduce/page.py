"""The report: Markdown, and one HTML page that needs nothing else and explains itself."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pacatune.experiments.paper import CITATION
from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.verdicts import RULE
from pacatune.reports.pages import inline_svg, render_page

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


def make_markdown(sections: Sequence[Section], heading: str) -> str:
    """Return the report as Markdown; pictures are files `NAME-1.svg`, ... beside it.

    Args:
        sections: In order.
        heading: Of the report.
    """
    parts = [f"# {heading}", "", *_paragraphs(_introduction())]
    for section in sections:
        parts += _section_markdown(section)
    return "\n".join(parts).rstrip() + "\n"


def make_result(section: Section) -> str:
    """Return what a section found, as Markdown for a terminal: tables and what contradicts."""
    lines = [f"## {section.title}", ""]
    for table in section.tables:
        lines += [f"### {table.title}", "", *table.lines(), ""]
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
        lines += [f"### {table.title}", "", *table.lines(), ""]
        lines += _paragraphs([table.note] if table.note else [])
    for number, chart in enumerate(section.charts, 1):
        lines += [f"![{chart.caption}]({section.name}-{number}.svg)", ""]
    for part in _lists(section):
        lines += [f"### {part['title']}", "", *(f"- {text}" for text in part["texts"]), ""]
    return [*lines, *_paragraphs([section.provenance] if section.provenance else [])]


def _introduction() -> list[str]:
    return [*INTRODUCTION, f"**What counts as a contradiction.** {RULE}"]


def _lists(section: Section) -> Iterator[dict[str, Any]]:
    """Yield the verdicts that are shown one by one, and what limits the comparison."""
    for outcome, title in _OUTCOMES.items():
        texts = [f"{v.text}." for v in section.verdicts if v.outcome == outcome]
        if texts:
            yield {"kind": outcome, "title": title, "texts": texts}
    if section.notes:
        yield {"kind": "", "title": "What limits the comparison", "texts": section.notes}


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


def make_html(sections: Sequence[Section], heading: str) -> str:
    """Return the report as one page; pictures are inside, nothing is loaded from elsewhere."""
    return render_page(
        "reproduction.html",
        heading=heading,
        introduction=_introduction(),
        sections=[_section_values(section) for section in sections],
    )


def _section_values(section: Section) -> dict[str, Any]:
    """Return what the template shows of a section."""
    charts = [
        {"svg": inline_svg(chart.svg, f"{section.name}-{number}"), "caption": chart.caption}
        for number, chart in enumerate(section.charts, 1)
    ]
    return {
        "name": section.name,
        "title": section.title,
        "place": section.place,
        "about": section.about,
        "summary": _summary(section),
        "tables": section.tables,
        "charts": charts,
        "lists": list(_lists(section)),
        "provenance": section.provenance,
    }
