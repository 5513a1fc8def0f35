"""Sweeps: batches or lengths until memory ends, each point in a process of its own."""

from collections.abc import Callable
from typing import Any

from pacatune.bench.child import Outcome, run_in_child
from pacatune.bench.config import BenchConfig, Setting
from pacatune.bench.measure import run_point

__all__ = ["find_limit", "sweep_method"]

_FIRST_LENGTH = 128
# Lengths are found to this share of themselves; batches exactly.
_PRECISION = 64


def find_limit(
    fits: Callable[[int], bool], *, start: int, highest: int | None, precision: int | None
) -> tuple[int, bool]:
    """Return the largest number that fits, and whether a larger one was found not to fit.

    Doubles from `start` until something does not fit, then halves the interval.

    Args:
        fits: Tries a number; what fits must also fit when it is smaller.
        start: First number.
        highest: Largest number to try, None without end.
        precision: Stop when the interval is below 1 / precision of the limit; None: at 1.
    """
    good, bad, number = 0, None, min(start, highest or start)
    while bad is None:
        if fits(number):
            good = number
            if number == highest:
                return good, False
            number = min(2 * number, highest or 2 * number)
        else:
            bad = number
    while bad - good > max(1, good // precision if precision else 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, True


def sweep_method(
    config: BenchConfig, method: str, tell: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the limit of one method, and a row for each point that was tried.

    Args:
        config: With a sweep.
        method: One of its methods.
        tell: Shows a line about each point.
    """
    points: list[dict[str, Any]] = []
    is_batch = config.sweep == "batch"

    def fits(number: int) -> bool:
        setting = Setting(
            num_rows=number if is_batch else 1, num_tokens=config.seq_len if is_batch else number
        )
        outcome = run_in_child(run_point, config, setting, method)
        points.append(_point(setting, method, outcome))
        tell(_line(points[-1]))
        return outcome.value is not None

    limit, is_reached = find_limit(
        fits,
        start=1 if is_batch else _FIRST_LENGTH,
        highest=config.sweep_max,
        precision=None if is_batch else _PRECISION,
    )
    points.sort(key=lambda point: (point["num_rows"], point["num_tokens"]))
    failed = next((p for p in points if p["status"] != "measured"), None)
    found = {
        "method": method,
        "sweep": config.sweep,
        "limit": limit,
        "is_memory_the_limit": is_reached,
        "next_failed": failed and failed["num_rows" if is_batch else "num_tokens"],
        "reason": failed and failed["reason"],
    }
    return found, points


def _point(setting: Setting, method: str, outcome: Outcome) -> dict[str, Any]:
    row = {**setting.to_dict(), "method": method}
    if outcome.value is None:
        return {**row, "status": "out of memory", "reason": outcome.reason}
    return {**row, "status": "measured", **outcome.value}


def _line(point: dict[str, Any]) -> str:
    text = f"{point['method']}, {point['setting']}: {point['status']}"
    if "sentences_per_second" in point:
        text += f", {point['sentences_per_second']:.3g} sentences/s"
    return text
