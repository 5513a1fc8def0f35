"""Make all measurements of one run, and write them as they come.

A comparison counts each method alone and times pairs in turns; a sweep tries batches or lengths
until memory ends. Each measurement is a process of its own.
"""

import datetime
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pacatune.files.owned_folder import OwnedFolder
from pacatune.measure.device import available_bytes, device_name
from pacatune.measure.setting import METHODS, BenchConfig, MicroBatch
from pacatune.measure.step import PHASES, count, run_in_child, run_point, time_together
from pacatune.measure.timing import compare, summarize
from pacatune.reports.provenance import commit, cpu, versions

RESULT_NAME, REPORT_NAME = "bench.json", "bench.md"
PICTURES = ("operations.png", "times.png", "memory.png", "throughput.png", "lengths.png")
Setting = MicroBatch
"""Its name in `pacatune.bench`."""

# A sweep on a CPU takes this share of free memory: with more, the system would swap, not fail.
_SHARE_OF_MEMORY = 0.8
_FIRST_LENGTH = 128
# Lengths are found to this share of themselves; batches exactly.
_PRECISION = 64
Row = dict[str, Any]
Rounds = list[tuple[float, float, float]]


def result_folder(path: Path) -> OwnedFolder:
    """Return the folder of a benchmark's results."""
    return OwnedFolder(path=path, kind="a benchmark")


def run(
    config: BenchConfig, folder: OwnedFolder, command: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure everything and return the result, written to an open folder after each measurement.

    The result records the user's command; `tell` shows a line about what goes on.
    """
    config = _with_limit(config)
    result = _provenance(config, command)
    if config.sweep is None:
        result |= {"rows": [], "ratios": []}
        for setting in config.settings:
            rows, ratios = compare_methods(config, setting, tell)
            result["rows"] += rows
            result["ratios"] += ratios
            folder.write_json(RESULT_NAME, result)
    else:
        result |= {"limits": [], "points": []}
        for method in config.methods:
            limit, points = sweep_method(config, method, tell)
            result["limits"].append(limit)
            result["points"] += points
            folder.write_json(RESULT_NAME, result)
    result["finished"] = True
    folder.write_json(RESULT_NAME, result)
    return result


def _with_limit(config: BenchConfig) -> BenchConfig:
    """Give a sweep on a CPU an end before the system starts to swap."""
    is_cpu = config.torch_device.type == "cpu"
    if config.sweep is None or config.memory_limit is not None or not is_cpu:
        return config
    free = available_bytes(config.torch_device)
    if free is None:
        raise ValueError(
            "a sweep on a CPU needs to know how much memory is free, and only Linux says; choose "
            "another device, or give a memory limit there."
        )
    return replace(config, memory_limit=int(_SHARE_OF_MEMORY * free))


def _provenance(config: BenchConfig, command: str) -> dict[str, Any]:
    device = config.torch_device
    plural = "s" * (config.threads != 1)
    threads = f", {config.threads} thread{plural}" if device.type == "cpu" else ""
    return {
        "finished": False,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device) + threads,
        "device_type": device.type,
        "cpu": cpu(),
        "versions": versions("bitsandbytes"),
        **commit(),
        "seed": config.seed,
        "model": f"{config.title}, random weights, {config.dtype}"
        + (f", lean level {config.lean_level}" if config.lean_level else "")
        + (", checkpointed blocks" if config.gradient_checkpointing else "")
        + (", compiled" if config.compiled else ""),
        "methods": {method: METHODS[method] for method in config.methods},
        "config": asdict(config),
    }


def compare_methods(
    config: BenchConfig, setting: MicroBatch, tell: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Return a row for each method and a ratio for each pair; what memory ended says so."""
    rows: dict[str, Row] = {}
    for method in config.methods:
        tell(f"{setting.label}: counting {method} ...")
        rows[method] = _row(count, config, setting, method)
    ratios: list[Row] = []
    rounds: dict[str, Rounds] = {method: [] for method in config.methods}
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


def _row(measure: Callable[..., Row], config: BenchConfig, setting: MicroBatch, method: str) -> Row:
    """Return what a measurement in a process of its own finds, or how memory ended it."""
    row = {**setting.to_dict(), "method": method}
    outcome = run_in_child(measure, config, setting, method)
    if outcome.value is None:
        return {**row, "status": "out of memory", "reason": outcome.reason}
    return {**row, "status": "measured", **outcome.value}


def _time(
    config: BenchConfig, setting: MicroBatch, methods: tuple[str, ...], rows: dict[str, Row]
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


def _ratio(config: BenchConfig, setting: MicroBatch, phases: dict[str, Rounds]) -> Row:
    """Compare whole steps, and forward and backward alone."""
    (method, ours), (reference, other) = phases.items()
    ratio = {**setting.to_dict(), "method": method, "reference": reference}
    steps = ([sum(times) for times in rounds] for rounds in (ours, other))
    ratio |= compare(*steps, seed=config.seed)
    for number, phase in enumerate(PHASES[:2]):
        columns = ([times[number] for times in rounds] for rounds in (ours, other))
        ratio[phase] = compare(*columns, seed=config.seed)
    return ratio


def _summarize(setting: MicroBatch, rounds: Rounds) -> Row:
    """Return medians and quartiles of steps and phases, and throughput."""
    row: Row = summarize([1e3 * sum(times) for times in rounds], "step_ms")
    for phase, seconds in zip(PHASES, zip(*rounds, strict=True), strict=True):
        row |= summarize([1e3 * second for second in seconds], f"{phase}_ms")
    return row | {"num_rounds": len(rounds)} | setting.rates(row["step_ms"])


def find_limit(
    fits: Callable[[int], bool], *, start: int, highest: int | None, precision: int | None
) -> tuple[int, bool]:
    """Return the largest number that fits, and whether a larger one was found not to fit.

    Doubles from `start` until something does not fit, then halves the interval until it is below
    1 / `precision` of the limit, or 1 without a precision. What fits must also fit when it is
    smaller.
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
) -> tuple[dict[str, Any], list[Row]]:
    """Return the limit of one method, and a row for each point that was tried."""
    points: list[Row] = []
    is_batch = config.sweep == "batch"

    def fits(number: int) -> bool:
        rows, tokens = (number, config.seq_len) if is_batch else (1, number)
        setting = MicroBatch(num_rows=rows, num_tokens=tokens)
        point = _row(run_point, config, setting, method)
        points.append(point)
        rate = point.get("sentences_per_second")
        shown = "" if rate is None else f", {rate:.3g} sentences/s"
        tell(f"{method}, {setting.label}: {point['status']}{shown}")
        return bool(point["status"] == "measured")

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
