"""The report: Markdown, and one HTML page that needs nothing else and explains itself."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pacatune.experiments.reproduce.experiment import Outcome, Section
from pacatune.experiments.reproduce.verdicts import RULE
from pacatune.paper import CITATION
from pacatune.reports.pages import inline_svg, render_page
from pacatune.reports.tables import ReportTable

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
_LISTED: dict[Outcome, str] = {
    "contradicts": "Contradicts the paper",
    "open": "Left open: alike here, where the paper has an order",
    "cannot_tell": "Cannot be told: our intervals are wider than the paper's difference",
}
_SHORT: dict[Outcome, str] = {
    "agrees": "agree",
    "cannot_tell": "cannot tell",
    "open": "open",
    "contradicts": "contradict",
}


def make_markdown(sections: Sequence[Section], heading: str) -> str:
    """Return the report as Markdown; pictures are files `NAME-1.svg`, ... beside it."""
    parts = [f"# {heading}", "", *_paragraphs(_introduction())]
    if len(sections) > 1:
        overview = outcomes_table(sections)
        parts += [f"## {overview.title}", "", *overview.lines(), "", overview.note, ""]
    for section in sections:
        parts += _section_markdown(section)
    return "\n".join(parts).rstrip() + "\n"


def make_result(section: Section) -> str:
    """Return what a section found, as Markdown for a terminal: tables and what contradicts."""
    lines = [f"## {section.title}", "", *_tables(section), *_paragraphs(_summary(section))]
    lines += [f"- {v.text}." for v in section.verdicts if v.outcome == "contradicts"]
    return "\n".join(lines)


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [line for text in texts if text for line in (text, "")]


def _tables(section: Section) -> list[str]:
    lines = []
    for table in section.tables:
        lines += [f"### {table.title}", "", *table.lines(), "", *_paragraphs([table.note])]
    return lines


def _section_markdown(section: Section) -> list[str]:
    lines = [f"## {section.title}", "", f"{section.place}.", "", *_paragraphs(section.about)]
    lines += [*_paragraphs(_summary(section)), *_tables(section)]
    for number, chart in enumerate(section.charts, 1):
        lines += [f"![{chart.caption}]({section.name}-{number}.svg)", ""]
    for part in _lists(section):
        lines += [f"### {part['title']}", "", *(f"- {text}" for text in part["texts"]), ""]
    return [*lines, *_paragraphs([section.provenance])]


def _introduction() -> list[str]:
    return [*INTRODUCTION, f"**What counts as a contradiction.** {RULE}"]


def _lists(section: Section) -> Iterator[dict[str, Any]]:
    """Yield the verdicts that are shown one by one, and what limits the comparison."""
    for outcome, title in _LISTED.items():
        texts = [f"{v.text}." for v in section.verdicts if v.outcome == outcome]
        if texts:
            yield {"kind": outcome, "title": title, "texts": texts}
    if section.notes:
        yield {"kind": "", "title": "What limits the comparison", "texts": section.notes}


def _summary(section: Section) -> list[str]:
    """Say how many comparisons agree, by where our numbers come from, and what is missing."""
    texts = []
    for origin in section.origins:
        counts = section.outcomes(origin)
        words = ", ".join(f"{counts[outcome]} {word}" for outcome, word in _SHORT.items())
        texts.append(f"**Comparisons of {origin} numbers: {words}.**")
    if section.rates:
        texts.append(
            f"The best learning rate of {_edges(section)} lines lies at the edge of its grid; a "
            "better one may lie outside."
        )
    if section.missing:
        texts.append(f"Not computed yet: {', '.join(section.missing)}.")
    return texts


def _edges(section: Section) -> str:
    """Return how many of the best rates lie at an edge: `2 of 5`; empty where nothing is tuned."""
    rates = section.rates.values()
    return f"{sum(rates)} of {len(rates)}" if rates else ""


def outcomes_table(sections: Sequence[Section]) -> ReportTable:
    """Return how the comparisons of all sections end, by where our numbers come from."""
    rows = [
        [
            section.name if number == 0 else "",
            origin,
            *(str(section.outcomes(origin)[outcome]) for outcome in _SHORT),
            _edges(section) if origin == "measured" else "",
        ]
        for section in sections
        for number, origin in enumerate(section.origins)
    ]
    return ReportTable(
        title="How the comparisons with the paper end",
        header=["", "our numbers", *_SHORT.values(), "best rates at an edge"],
        rows=rows,
        note="Rates: lines whose best learning rate is the smallest or largest that was tried.",
    )


def make_html(sections: Sequence[Section], heading: str) -> str:
    """Return the report as one page; pictures are inside, nothing is loaded from elsewhere."""
    return render_page(
        "reproduction.html",
        heading=heading,
        introduction=_introduction(),
        overview=outcomes_table(sections) if len(sections) > 1 else None,
        sections=[
            {
                "name": section.name,
                "title": section.title,
                "place": section.place,
                "about": section.about,
                "summary": _summary(section),
                "tables": section.tables,
                "charts": [
                    {"svg": inline_svg(c.svg, f"{section.name}-{number}"), "caption": c.caption}
                    for number, c in enumerate(section.charts, 1)
                ],
                "lists": list(_lists(section)),
                "provenance": section.provenance,
            }
            for section in sections
        ],
    )
