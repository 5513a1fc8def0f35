"""What becomes of measured times: a row per method, a ratio per pair, and a table to print."""

from typing import Any

from rich import box
from rich.table import Table

from benchmarks.methods import OURS
from pacatune.measure.timing import compare


def make_ratios(
    setting: dict[str, Any],
    times: dict[str, list[float]],
    targets: dict[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """Compare PaCA with every other method of one setting; nothing, where it was not measured.

    `targets` maps other methods to the highest acceptable ratio, `seed` is that of the intervals.
    """
    ratios = []
    for reference in times:
        if OURS not in times or reference == OURS:
            continue
        ratio = compare(times[OURS], times[reference], seed=seed)
        target = targets.get(reference)
        verdict = {
            "target": target,
            "is_reached": None if target is None else ratio["ratio"] <= target,
        }
        ratios.append({**setting, "reference": reference, **ratio, **verdict})
    return ratios


def ratio_table(result: dict[str, Any]) -> Table:
    """Return PaCA's time as a share of each other method's, as a Markdown table."""
    table = Table(box=box.MARKDOWN)
    table.add_column("setting", no_wrap=True)
    table.add_column(f"{OURS} /", no_wrap=True)
    for title in ("of medians", "95 %", "of minima", "target"):
        table.add_column(title, justify="right", no_wrap=True)
    for ratio in result["ratios"]:
        table.add_row(
            ratio["setting"],
            ratio["reference"],
            f"{ratio['ratio']:.3f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            f"{ratio['ratio_of_minima']:.3f}",
            _target(ratio),
        )
    return table


def _target(ratio: dict[str, Any]) -> str:
    if ratio["target"] is None:
        return ""
    colour, verdict = ("green", "reached") if ratio["is_reached"] else ("red", "missed")
    return f"<= {ratio['target']:.2f} [{colour}]{verdict}[/{colour}]"
