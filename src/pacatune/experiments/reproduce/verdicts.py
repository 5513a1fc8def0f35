"""Ours beside the paper's: differences, and by one stated rule, what contradicts it."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pacatune.experiments.paper import METHOD_TITLES
from pacatune.experiments.paper.fig2 import Claim
from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.section import Measured, Outcome, Verdict
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
    "share",
]


RULE = (
    "Two lines of one model are compared in each quantity. The paper puts them in an order if its "
    "numbers differ by more than a margin (what rounding hides, or what its text calls comparable) "
    "and has them alike otherwise. Here they are in an order if their intervals do not overlap and "
    "they differ by more than the margin stated for our numbers. The opposite order contradicts "
    "the paper, and so does an order where the paper has them alike; overlapping intervals where "
    "the paper has an order leave it open; the rest agrees. A model that is not trained is not "
    "compared where ours has another task: what training adds there is no matter of the method."
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
    is_inverted: bool = False
    """Whether less of ours is as good as more of the paper's: a loss beside a score."""
    about: str = ""
    """How ours is obtained, for the reader."""

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
    if stated == found:
        outcome: Outcome = "agrees"
    elif found == 0:
        outcome = "open"
    else:
        outcome = "contradicts"
    names = tuple(_name(row) for row in rows)
    unit, our_unit = column.paper.unit, column.quantity.unit
    theirs, mine = (_sentence(column, names, order) for order in (stated, found))
    text = (
        f"{column.quantity.title}, {rows[0].model}: the paper has {theirs} ({a:g} and {b:g} "
        f"{unit}); here {mine} ({_interval(here[0])} and {_interval(here[1])} {our_unit})"
    )
    return Verdict(outcome=outcome, text=text)


def _order(column: Column, a: Measured, b: Measured) -> int:
    """Return 1 if a is surely above b (a better score), -1 if below, 0 if neither."""
    margin = column.quantity.margin
    if not column.is_same and not column.is_score:
        margin *= max(abs(a.value), abs(b.value))
    sign = -1 if column.is_inverted else 1
    if a.low > b.high and a.value - b.value > margin:
        return sign
    if b.low > a.high and b.value - a.value > margin:
        return -sign
    return 0


def _sentence(column: Column, names: tuple[str, ...], order: int) -> str:
    first, second = names
    if order == 0:
        return f"{first} and {second} alike"
    words = ("better than", "worse than") if column.is_score else ("above", "below")
    return f"{first} {words[order < 0]} {second}"


def _name(row: Row) -> str:
    return row.title if row.rank is None else f"{row.title} (rank {row.rank})"


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
    "contradicts the paper if its whole interval lies elsewhere, and leaves it open if a part "
    "does."
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
    return Verdict(outcome=outcome, text=text)


def _outcome(claim: Claim, ours: Measured) -> Outcome:
    if ours.origin == "counted":
        near = abs(ours.value - claim.ratio) <= claim.margin
        return "agrees" if near else "contradicts"
    low, high = _region(claim)
    if low <= ours.low and ours.high <= high:
        return "agrees"
    return "contradicts" if ours.high < low or ours.low > high else "open"


def _region(claim: Claim) -> tuple[float, float]:
    """Return where a share agrees with the statement on another machine."""
    if abs(claim.ratio - 1) <= claim.margin:
        return 1 - claim.margin, 1 + claim.margin
    return (0.0, 1.0) if claim.ratio < 1 else (1.0, float("inf"))


def _what(claim: Claim) -> str:
    what = f"{claim.quantity} of {METHOD_TITLES[claim.method]}'s {claim.phase}"
    return f"{what} / {METHOD_TITLES[claim.of_method]}'s {claim.of_phase}"


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
