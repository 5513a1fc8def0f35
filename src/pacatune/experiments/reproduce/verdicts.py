"""Ours beside the paper's: differences, and by one stated rule, what contradicts it."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from pacatune.experiments.reproduce.experiment import Measured, Outcome, Verdict
from pacatune.paper import METHOD_TITLES
from pacatune.paper.fig2 import Claim
from pacatune.paper.tables import Quantity, Row, Table
from pacatune.reports.tables import ReportTable

RULE = (
    "Two lines of one model are compared in each quantity. The paper puts them in an order if its "
    "numbers differ by more than a margin (what rounding hides, or what its text calls comparable) "
    "and has them alike otherwise. Here they are in an order if their intervals do not overlap and "
    "they differ by more than the margin stated for our numbers. The same order agrees, the "
    "opposite one contradicts, and so does an order where the paper has them alike. Where we find "
    "no order, we cannot tell if our intervals are wider than the paper's difference (or, where "
    "the paper has them alike, than our margin): then a difference like the paper's would not have "
    "been seen. If they are narrower, lines that the paper has alike agree, and an order of the "
    "paper stays open. A model that is not trained is not compared where ours has another task: "
    "what training adds there is no matter of the method."
)

Numbers = Mapping[str, Measured]
"""Row of the paper's table -> ours."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A quantity of ours, and the paper's quantity beside which it stands."""

    quantity: Quantity
    """Ours. Its margin is a share of the number where `is_same` is False and the kind is no
    score."""
    paper: Quantity
    model: str = ""
    """What ours was obtained on, where that is not the paper's model at its size."""
    rank: Callable[[Row], int | None] = lambda row: row.rank
    """Rank of ours in a line of the paper."""
    is_inverted: bool = False
    """Whether less of ours is as good as more of the paper's: a loss beside a score."""
    about: str = ""
    """How ours is obtained, for the reader."""

    @property
    def is_same(self) -> bool:
        """Whether numbers can be compared, and not shares alone."""
        return not self.model

    @property
    def is_score(self) -> bool:
        """Whether differences are points and not shares."""
        return self.quantity.kind == "score"


def same_column(paper: Quantity, key: str, title: str, about: str) -> Column:
    """Return the column of the same quantity as the paper's, obtained at its own size."""
    return Column(quantity=replace(paper, key=key, title=title), paper=paper, about=about)


def judge(table: Table, column: Column, ours: Numbers) -> Iterator[Verdict]:
    """Yield a verdict for each pair of lines of one model that both sides have numbers of."""
    known = [
        row
        for row in table.rows
        if column.paper.key in row.values
        and row.key in ours
        and (column.is_same or row.method != "none")
    ]
    for first, second in itertools.combinations(known, 2):
        if first.model == second.model:
            yield _judge(column, (first, second), (ours[first.key], ours[second.key]))


def _judge(column: Column, rows: tuple[Row, Row], here: tuple[Measured, Measured]) -> Verdict:
    a, b = (row.values[column.paper.key] for row in rows)
    stated = 0 if abs(a - b) <= column.paper.margin else (1 if a > b else -1)
    found = _order(column, *here)
    half_width = sum(number.high - number.low for number in here) / 2
    outcome: Outcome
    if found != 0:
        outcome = "agrees" if stated == found else "contradicts"
    elif half_width > _reach(column, (a, b), here, is_ordered=stated != 0):
        outcome = "cannot_tell"
    else:
        outcome = "agrees" if stated == 0 else "open"
    theirs = _sentence(column, [name_of(row, row.rank) for row in rows], stated, "alike")
    alike = "not told apart" if outcome == "cannot_tell" else "alike"
    mine = _sentence(column, [name_of(row, column.rank(row)) for row in rows], found, alike)
    place, of_paper, on = f", {rows[0].model}", "", ""
    if not column.is_same:
        place, of_paper, on = "", place, f" on {column.model}"
    shown = [number.text("{:.4g}".format) for number in here]
    text = (
        f"{column.quantity.title}{place}: the paper has {theirs} ({a:g} and {b:g} "
        f"{column.paper.unit}{of_paper}); here{on} {mine} "
        f"({shown[0]} and {shown[1]} {column.quantity.unit})"
    )
    return Verdict(outcome=outcome, origin=here[0].origin, text=text)


def _reach(
    column: Column, paper: tuple[float, float], here: tuple[Measured, Measured], *, is_ordered: bool
) -> float:
    """Return the difference that our intervals must be able to show, in our unit."""
    margin = _margin(column, *here)
    if not is_ordered:
        return margin
    difference = abs(paper[0] - paper[1])
    if column.is_same or column.quantity.unit == column.paper.unit:
        return difference
    if column.is_score:  # another scale: what counts as a difference is ours to say
        return margin
    return difference / max(map(abs, paper)) * max(abs(number.value) for number in here)


def _margin(column: Column, a: Measured, b: Measured) -> float:
    margin = column.quantity.margin
    if not column.is_same and not column.is_score:
        margin *= max(abs(a.value), abs(b.value))
    return margin


def _order(column: Column, a: Measured, b: Measured) -> int:
    """Return 1 if a is surely above b (a better score), -1 if below, 0 if neither."""
    margin = _margin(column, a, b)
    sign = -1 if column.is_inverted else 1
    if a.low > b.high and a.value - b.value > margin:
        return sign
    if b.low > a.high and b.value - a.value > margin:
        return -sign
    return 0


def _sentence(column: Column, names: list[str], order: int, alike: str) -> str:
    first, second = names
    if order == 0:
        return f"{first} and {second} {alike}"
    words = ("better than", "worse than") if column.is_score else ("above", "below")
    return f"{first} {words[order < 0]} {second}"


def name_of(row: Row, rank: int | None) -> str:
    """Return a line's method, with a rank where it has one."""
    return row.title if rank is None else f"{row.title} (rank {rank})"


def share(column: Column, value: float, reference: float) -> float:
    """Return points over a reference of a score, a share of it of anything else."""
    return value - reference if column.is_score else value / reference


CLAIM_RULE = (
    "A statement gives one quantity as a share of another. Counted at the paper's own size it must "
    "be met within the margin that its words leave. Measured on another machine or model, the "
    "share must lie on the same side of 1, or within the margin of 1 where the paper's does; it "
    "contradicts the paper if its whole interval lies elsewhere. If a part of it does, we cannot "
    "tell if the interval is wider than the paper's distance from 1 (or than the margin), and it "
    "stays open otherwise."
)


def judge_claim(claim: Claim, ours: Measured) -> Verdict:
    """Say whether a statement holds here."""
    text = (
        f"'{claim.quote}' (section {claim.section}): {_what(claim)} is {claim.ratio:g} in the "
        f"paper, {ours.text('{:.3f}'.format)} here ({ours.origin})"
    )
    return Verdict(outcome=_outcome(claim, ours), origin=ours.origin, text=text)


def _outcome(claim: Claim, ours: Measured) -> Outcome:
    if ours.origin == "counted":
        near = abs(ours.value - claim.ratio) <= claim.margin
        return "agrees" if near else "contradicts"
    if abs(claim.ratio - 1) <= claim.margin:
        region = 1 - claim.margin, 1 + claim.margin
    else:
        region = (0.0, 1.0) if claim.ratio < 1 else (1.0, float("inf"))
    if region[0] <= ours.low and ours.high <= region[1]:
        return "agrees"
    if ours.high < region[0] or ours.low > region[1]:
        return "contradicts"
    return share_outcome(ours, claim.ratio, claim.margin)


def share_outcome(ours: Measured, stated: float, margin: float) -> Outcome:
    """Return what becomes of a share that lies partly where the paper's does, or alike near 1."""
    is_wide = (ours.high - ours.low) / 2 > max(abs(stated - 1), margin)
    return "cannot_tell" if is_wide else "open"


def _what(claim: Claim) -> str:
    what, of = (f"{METHOD_TITLES[method]}'s {phase}" for method, phase in (claim.what, claim.of))
    return f"{claim.quantity} of {what} / {of}"


def claims_table(found: list[tuple[Claim, Measured]]) -> ReportTable:
    """Return the statements with both numbers."""
    rows = [
        [
            _what(claim),
            f"section {claim.section}",
            f"{claim.ratio:g}",
            ours.text("{:.3f}".format, " ({} to {})"),
            f"{ours.value - claim.ratio:+.3f}",
        ]
        for claim, ours in found
    ]
    header = ["share", "where", "paper", "here", "difference"]
    return ReportTable(title="What the text states", header=header, rows=rows, note=CLAIM_RULE)
