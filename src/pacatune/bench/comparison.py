"""Compare the methods in one setting: each counted alone, each pair timed in turns."""

from collections.abc import Callable
from typing import Any

from pacatune.bench.child import run_in_child
from pacatune.bench.config import BenchConfig, Setting
from pacatune.bench.measure import PHASES, count, time_together
from pacatune.bench.timing import compare, summarize

__all__ = ["compare_methods"]

Row = dict[str, Any]
Rounds = list[tuple[float, float, float]]


def compare_methods(
    config: BenchConfig, setting: Setting, tell: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Return a row for each method and a ratio for each pair; what memory ended says so.

    Args:
        config: Whose methods.
        setting: Size of the micro-batch.
        tell: Shows a line about what goes on.
    """
    rows: dict[str, Row] = {}
    for method in config.methods:
        tell(f"{setting.label}: counting {method} ...")
        rows[method] = _count(config, setting, method)
    ratios, rounds = [], {method: [] for method in config.methods}  # type: ignore[var-annotated]
    for pair in config.pairs:
        methods = tuple(method for method in pair if rows[method]["status"] == "measured")
        if not methods:
            continue
        tell(f"{setting.label}: timing {' and '.join(methods)} ...")
        for phases, noise in _time(config, setting, methods, rows):
            for method, times in phases.items():
                rounds[method] += times
                rows[method].setdefault("noise", []).append(noise)
            if len(phases) == 2:
                ratios.append(_ratio(config, setting, phases))
    for method, row in rows.items():
        if rounds[method]:
            row |= _summarize(setting, rounds[method])
    return list(rows.values()), ratios


def _count(config: BenchConfig, setting: Setting, method: str) -> Row:
    row = {**setting.to_dict(), "method": method, "status": "measured"}
    outcome = run_in_child(count, config, setting, method)
    if outcome.value is None:
        return row | {"status": "out of memory", "reason": outcome.reason}
    return row | outcome.value


def _time(
    config: BenchConfig, setting: Setting, methods: tuple[str, ...], rows: dict[str, Row]
) -> list[tuple[dict[str, Rounds], dict[str, Any]]]:
    """Time methods in one process; where they do not fit together, each in one of its own."""
    outcome = run_in_child(time_together, config, setting, methods)
    if outcome.value is not None:
        return [(outcome.value["phases"], outcome.value["noise"])]
    if len(methods) == 1:
        rows[methods[0]] |= {"status": "out of memory", "reason": outcome.reason}
        return []
    timed = []
    for method in methods:
        rows[method].setdefault("timed_apart_from", []).extend(m for m in methods if m != method)
        timed += _time(config, setting, (method,), rows)
    return timed


def _ratio(config: BenchConfig, setting: Setting, phases: dict[str, Rounds]) -> Row:
    """Compare whole steps, and forward and backward alone."""
    (method, ours), (reference, other) = phases.items()
    ratio = {**setting.to_dict(), "method": method, "reference": reference}
    steps = ([sum(times) for times in rounds] for rounds in (ours, other))
    ratio |= compare(*steps, seed=config.seed)
    for number, phase in enumerate(PHASES[:2]):
        columns = ([times[number] for times in rounds] for rounds in (ours, other))
        ratio[phase] = compare(*columns, seed=config.seed)
    return ratio


def _summarize(setting: Setting, rounds: Rounds) -> Row:
    """Return medians and quartiles of steps and phases, and throughput."""
    row: Row = summarize([1e3 * sum(times) for times in rounds], "step_ms")
    for phase, seconds in zip(PHASES, zip(*rounds, strict=True), strict=True):
        row |= summarize([1e3 * second for second in seconds], f"{phase}_ms")
    rate = 1e3 * setting.num_rows / row["step_ms"]
    return row | {
        "num_rounds": len(rounds),
        "sentences_per_second": rate,
        "tokens_per_second": rate * setting.num_tokens,
    }
