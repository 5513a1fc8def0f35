"""Ours beside the paper's: differences, and by one stated rule, what contradicts it."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pacatune.experiments.reproduce.section import Measured, Outcome, Verdict
from pacatune.paper import METHOD_TITLES
from pacatune.paper.fig2 import Claim
from pacatune.paper.tables import Quantity, Row, Table
from pacatune.reports.tables import ReportTable

__all__ = [
    "CLAIM_RULE",
    "RULE",
    "ClaimResult",
    "Column",
    "Ours",
    "claims_table",
    "judge",
    "judge_claim",
    "name_of",
    "share",
    "share_outcome",
]


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

UNTRAINED = "none"

# Row of the paper's table, our quantity -> number.
Ours = Mapping[tuple[str, str], Measured]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A quantity of ours, and the paper's quantity beside which it stands."""

    quantity: Quantity
    """Ours. Its margin is a share of the number where `is_same` is False and the kind is no
    score."""
    paper: Quantity
    is_same: bool
    """Whether both measure the same thing at the same size, so that numbers can be compared and not
    shares alone."""
    model: str = ""
    """What ours was obtained on, where that is not the paper's model."""
    rank: Callable[[Row], int | None] = lambda row: row.rank
    """Rank of ours in a line of the paper."""
    is_inverted: bool = False
    """Whether less of ours is as good as more of the paper's: a loss beside a score."""
    about: str = ""
    """How ours is obtained, for the reader."""

    def __post_init__(self) -> None:
        assert self.is_same or self.model, "numbers of another model must name it"

    @property
    def is_score(self) -> bool:
        """Whether differences are points and not shares."""
        return self.quantity.kind == "score"


def judge(table: Table, column: Column, ours: Ours) -> Iterator[Verdict]:
    """Yield a verdict for each pair of lines of one model that both sides have numbers of."""
    key = column.quantity.key
    known = [
        row
        for row in table.rows
        if column.paper.key in row.values
        and (row.key, key) in ours
        and (column.is_same or row.method != UNTRAINED)
    ]
    for first, second in itertools.combinations(known, 2):
        if first.model == second.model:
            yield _judge(column, (first, second), (ours[first.key, key], ours[second.key, key]))


def _judge(column: Column, rows: tuple[Row, Row], here: tuple[Measured, Measured]) -> Verdict:
    a, b = (row.values[column.paper.key] for row in rows)
    stated = 0 if abs(a - b) <= column.paper.margin else (1 if a > b else -1)
    found = _order(column, *here)
    outcome: Outcome
    if found != 0:
        outcome = "agrees" if stated == found else "contradicts"
    elif _half_width(*here) > _reach(column, (a, b), here, is_ordered=stated != 0):
        outcome = "cannot_tell"
    else:
        outcome = "agrees" if stated == 0 else "open"
    theirs = _sentence(column, [name_of(row, row.rank) for row in rows], stated)
    alike = "not told apart" if outcome == "cannot_tell" else "alike"
    mine = _sentence(column, [name_of(row, column.rank(row)) for row in rows], found, alike)
    place, on = f", {rows[0].model}", ""
    if not column.is_same:
        place, on = "", f" on {column.model}"
    text = (
        f"{column.quantity.title}{place}: the paper has {theirs} ({a:g} and {b:g} "
        f"{column.paper.unit}{'' if column.is_same else f', {rows[0].model}'}); here{on} {mine} "
        f"({_interval(here[0])} and {_interval(here[1])} {column.quantity.unit})"
    )
    return Verdict(outcome=outcome, origin=here[0].origin, text=text)


def _half_width(a: Measured, b: Measured) -> float:
    """Return the least difference between two numbers whose intervals do not overlap."""
    return ((a.high - a.low) + (b.high - b.low)) / 2


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


def _sentence(column: Column, names: Sequence[str], order: int, alike: str = "alike") -> str:
    first, second = names
    if order == 0:
        return f"{first} and {second} {alike}"
    words = ("better than", "worse than") if column.is_score else ("above", "below")
    return f"{first} {words[order < 0]} {second}"


def name_of(row: Row, rank: int | None) -> str:
    """Return a line's method, with a rank where it has one."""
    return row.title if rank is None else f"{row.title} (rank {rank})"


def _interval(number: Measured) -> str:
    if number.low == number.high:
        return f"{number.value:.4g}"
    return f"{number.value:.4g} [{number.low:.4g}, {number.high:.4g}]"


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


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """A statement and what is found of it."""

    claim: Claim
    ours: Measured


def judge_claim(result: ClaimResult) -> Verdict:
    """Say whether a statement holds here."""
    claim, ours = result.claim, result.ours
    outcome = _outcome(claim, ours)
    spread = "" if ours.low == ours.high else f" [{ours.low:.3f}, {ours.high:.3f}]"
    text = (
        f"'{claim.quote}' (section {claim.section}): {_what(claim)} is {claim.ratio:g} in the "
        f"paper, {ours.value:.3f}{spread} here ({ours.origin})"
    )
    return Verdict(outcome=outcome, origin=ours.origin, text=text)


def _outcome(claim: Claim, ours: Measured) -> Outcome:
    if ours.origin == "counted":
        near = abs(ours.value - claim.ratio) <= claim.margin
        return "agrees" if near else "contradicts"
    low, high = _region(claim)
    if low <= ours.low and ours.high <= high:
        return "agrees"
    if ours.high < low or ours.low > high:
        return "contradicts"
    return share_outcome(ours, claim.ratio, claim.margin)


def share_outcome(ours: Measured, stated: float, margin: float) -> Outcome:
    """Return what becomes of a share whose interval lies partly where the paper's does.

    Args:
        ours: The share.
        stated: The paper's.
        margin: How near to 1 is alike.
    """
    is_wide = (ours.high - ours.low) / 2 > max(abs(stated - 1), margin)
    return "cannot_tell" if is_wide else "open"


def _region(claim: Claim) -> tuple[float, float]:
    """Return where a share agrees with the statement on another machine."""
    if abs(claim.ratio - 1) <= claim.margin:
        return 1 - claim.margin, 1 + claim.margin
    return (0.0, 1.0) if claim.ratio < 1 else (1.0, float("inf"))


def _what(claim: Claim) -> str:
    what, of = (f"{METHOD_TITLES[method]}'s {phase}" for method, phase in (claim.what, claim.of))
    return f"{claim.quantity} of {what} / {of}"


def claims_table(results: list[ClaimResult]) -> ReportTable:
    """Return the statements with both numbers."""
    rows = [
        [
            _what(one.claim),
            f"section {one.claim.section}",
            f"{one.claim.ratio:g}",
            f"{one.ours.value:.3f}"
            + (
                ""
                if one.ours.low == one.ours.high
                else f" ({one.ours.low:.3f} to {one.ours.high:.3f})"
            ),
            f"{one.ours.value - one.claim.ratio:+.3f}",
        ]
        for one in results
    ]
    header = ["share", "where", "paper", "here", "difference"]
    return ReportTable(title="What the text states", header=header, rows=rows, note=CLAIM_RULE)
