"""Make all measurements of one run: jobs whose rows are kept, tables, and a picture.

A comparison counts each method alone and times pairs in turns; a sweep tries batches or lengths
until memory ends. Each measurement is a process of its own.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pacatune.files.folder import format_bytes
from pacatune.files.owned_folder import OwnedFolder
from pacatune.measure.device import device_name
from pacatune.measure.setting import METHODS, BenchConfig, MicroBatch
from pacatune.measure.step import count, run_in_child, run_point, time_together
from pacatune.reports.figures import save_figure
from pacatune.reports.provenance import commit, commit_text, versions, versions_text
from pacatune.reports.rows import Job, Row, Table, done, plot, table

RESULT_NAME, REPORT_NAME, PICTURE_NAME = "bench.json", "bench.md", "bench.png"

# A sweep on a CPU takes this share of free memory: with more, the system would swap, not fail.
_SHARE_OF_MEMORY = 0.8
_PACKAGES = ("bitsandbytes",)
_FIRST_LENGTH = 128
# Lengths are found to this share of themselves; batches exactly.
_PRECISION = 64
_LIMITS = {"batch": "largest batch", "seq-len": "longest sequence"}
_DRAWN = ("step", "kept for backward", "peak", *_LIMITS.values())
_RATIOS = "Ratios of medians, with 95 % intervals of a paired bootstrap"
_TIMES = "Times and throughput: medians, with quartiles"
_KINDS = "Kept for backward, by kind of module"
_NUMBERS = "Operations and memory"


def result_folder(path: Path) -> OwnedFolder:
    """Return the folder of a benchmark's results."""
    return OwnedFolder(path=path, kind="a benchmark")


def run(
    config: BenchConfig, folder: OwnedFolder, command: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Do the jobs that an open folder has no rows of; write and return all rows, and write a page.

    The result records the user's command; `tell` shows a line about what goes on.
    """
    jobs = make_jobs(config)
    found = done(jobs, folder, tell=tell, packages=_PACKAGES)
    titles = {job.key: job.title for job in jobs}
    result = {
        "command": command,
        "model": describe(config),
        "device": device_text(config),
        "methods": {method: METHODS[method].summary for method in config.methods},
        "config": asdict(config),
        "rows": [row.to_dict() for one in found.values() for row in one.rows],
        "errors": {titles[key]: one.error for key, one in found.items() if one.error},
        "jobs": {key: one.provenance for key, one in found.items()},
    }
    folder.write_json(RESULT_NAME, result)
    write_page(result, folder)
    return result


def device_text(config: BenchConfig) -> str:
    """Return the device's name, and the threads of a CPU."""
    name = device_name(config.torch_device)
    plural = "s" * (config.threads != 1)
    is_cpu = config.torch_device.type == "cpu"
    return f"{name}, {config.threads} thread{plural}" if is_cpu else name


def describe(config: BenchConfig) -> str:
    """Return the model and its form, as the page is headed."""
    return (
        f"{config.title}, random weights, {config.dtype}"
        + (f", lean level {config.lean_level}" if config.lean_level else "")
        + (", checkpointed blocks" if config.gradient_checkpointing else "")
        + (", compiled" if config.compiled else "")
    )


def make_jobs(config: BenchConfig) -> list[Job]:
    """Return the work of a run; what another run of the folder did of it is not done again."""
    made = {"on": device_text(config), "versions": versions(*_PACKAGES), **commit()}
    shared = {k: v for k, v in asdict(config).items() if k not in ("methods", "tokens")} | made

    def job(title: str, measure: Callable[[], list[Row]], **inputs: Any) -> Job:
        key = title.replace(" and ", " ").replace(" tokens: ", " ").replace(" ", "-")
        return Job(key=key, inputs=shared | inputs, run=lambda folder: measure(), title=title)

    if config.sweep is not None:
        config = _limited(config)
        return [
            job(f"{config.sweep} of {m}", partial(sweep_method, config, m), method=m)
            for m in config.methods
        ]
    jobs, timed = [], set[str]()
    for setting in config.settings:
        for method in config.methods:
            measure = partial(run_in_child, count, config, setting, method)
            jobs.append(job(f"{setting.label}: counting {method}", measure))
        timed.clear()
        for pair in config.pairs:
            # Ours is in each pair: its own times are those of the first.
            new = [method for method in pair if method not in timed]
            timed.update(pair)
            measure = partial(time_pair, config, setting, pair, new)
            jobs.append(job(f"{setting.label}: timing {' and '.join(pair)}", measure, new=new))
    return jobs


def _limited(config: BenchConfig) -> BenchConfig:
    """Return a sweep that ends where a CPU would start to swap, at one limit for all methods."""
    if config.memory_limit is not None or config.torch_device.type != "cpu":
        return config
    return replace(config, memory_limit=int(_SHARE_OF_MEMORY * psutil.virtual_memory().available))


def time_pair(
    config: BenchConfig, setting: MicroBatch, pair: tuple[str, ...], new: list[str]
) -> list[Row]:
    """Time methods in one process, or each in its own where memory is too short for both.

    Returns their ratios, and the times of those that are new.
    """
    try:
        rows = run_in_child(time_together, config, setting, pair)
        return [row for row in rows if row.unit == "ratio" or row.method in new]
    except MemoryError as error:
        if len(pair) == 1:
            raise
        rows, reason = [], str(error)
    for method in new:
        try:
            rows += run_in_child(time_together, config, setting, (method,))
        except MemoryError as error:
            reason = str(error)
    if not rows:
        raise MemoryError(reason)
    (other,) = (method for method in pair if method != rows[-1].method)
    note = f"`{rows[-1].method}` did not fit beside `{other}` ({reason}): timed alone."
    return [*rows[:-1], replace(rows[-1], note=note)]


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


def sweep_method(config: BenchConfig, method: str) -> list[Row]:
    """Return the limit of one method, and the rows of each point that was tried."""
    points: dict[int, list[Row]] = {}
    failed: dict[int, str] = {}
    is_batch = config.sweep == "batch"

    def fits(number: int) -> bool:
        rows, tokens = (number, config.seq_len) if is_batch else (1, number)
        setting = MicroBatch(num_rows=rows, num_tokens=tokens)
        try:
            points[number] = run_in_child(run_point, config, setting, method)
        except MemoryError as error:
            failed[number] = str(error)
        return number in points

    most, is_reached = find_limit(
        fits,
        start=1 if is_batch else _FIRST_LENGTH,
        highest=config.sweep_max,
        precision=None if is_batch else _PRECISION,
    )
    note = f"`{method}`: {most:,} is the largest tried."
    if is_reached:
        limit = config.memory_limit
        of = "" if limit is None else f" of {format_bytes(limit)}"
        next_one = min(failed)
        note = f"`{method}`: memory{of} ended at {next_one:,} ({failed[next_one]})."
    names: dict[str, Any] = {"method": method, "model": config.title}
    what = _LIMITS["batch" if is_batch else "seq-len"]
    setting = f"rows of {config.seq_len} tokens" if is_batch else "one row"
    found = Row(what=what, value=most, setting=setting, note=note, **names)
    return [found, *(row for _, rows in sorted(points.items()) for row in rows)]


def write_page(result: dict[str, Any], folder: OwnedFolder) -> None:
    """Write the Markdown page of a result, and its picture if there is something to draw."""
    shown = tables(result)
    parts = [f"# {result['model']}", source(result)]
    parts.append("\n".join(f"- `{name}`: {what}" for name, what in result["methods"].items()))
    for title, one in shown.items():
        parts += [f"## {title}", "\n".join(one.markdown()), *one.notes]
    parts += problems(result)
    rows = [
        row
        for row in _rows(result)
        if row.unit != "ratio" and (row.what in _DRAWN or row.unit == "sentences/s")
    ]
    if rows:
        with folder.staged() as staging:
            save_figure(plot(rows, ("setting",), ("method",)), staging / PICTURE_NAME)
        parts.append(f"![{PICTURE_NAME}]({PICTURE_NAME})")
    else:
        folder.clear(PICTURE_NAME)
    folder.write(REPORT_NAME, "\n\n".join(parts) + "\n")


def _rows(result: dict[str, Any]) -> list[Row]:
    """Return the rows by setting and method: pairs are timed in another order."""
    rows, methods = [Row(**row) for row in result["rows"]], [*result["methods"]]
    settings = [*dict.fromkeys(row.setting for row in rows)]

    def place(row: Row) -> tuple[int, int]:
        method = methods.index(row.method) if row.method in methods else len(methods)
        return settings.index(row.setting), method

    return sorted(rows, key=place)


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Return the tables of a result by their titles."""
    groups: dict[str, list[Row]] = {}
    for row in _rows(result):
        groups.setdefault(_title_of(row), []).append(row)
    order = [*_LIMITS.values(), _TIMES, _RATIOS, _NUMBERS, _KINDS]
    return {
        title: table(groups[title], ("setting", "method"), ("what",))
        for title in order
        if title in groups
    }


def _title_of(row: Row) -> str:
    if row.unit == "ratio":
        return _RATIOS
    if row.what in _LIMITS.values():
        return row.what
    if row.what.startswith("kept by "):
        return _KINDS
    return _TIMES if row.unit in ("ms", "tokens/s", "sentences/s") else _NUMBERS


def problems(result: dict[str, Any]) -> list[str]:
    """Return a sentence for each measurement that failed."""
    return [f"Failed: {title}: {error}" for title, error in result["errors"].items()]


def source(result: dict[str, Any]) -> str:
    """Return where a result comes from."""
    jobs = [*result["jobs"].values()]
    last = max(jobs, key=lambda job: job["date"])
    return (
        f"`{result['command']}`{commit_text(last)} on {result['device']}, {last['date']}, seed "
        f"{result['config']['seed']} ({versions_text(last['versions'])})."
    )
