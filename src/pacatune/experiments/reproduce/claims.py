"""Statements of the paper's text, each checked by one rule."""

from dataclasses import dataclass

from pacatune.experiments.paper import METHOD_TITLES
from pacatune.experiments.paper.fig2 import Claim
from pacatune.experiments.reproduce.compare import Outcome, Verdict
from pacatune.experiments.reproduce.measured import Measured
from pacatune.reports.tables import ReportTable

__all__ = ["CLAIM_RULE", "ClaimResult", "claims_table", "judge_claim"]

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
