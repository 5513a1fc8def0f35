"""The result as a page: tables of what was measured, with the paper's own numbers beside."""

from collections.abc import Iterable
from typing import Any

from pacatune.files.folder import format_bytes
from pacatune.paper import fig3
from pacatune.paper import ratios as paper

__all__ = ["make_report", "measured_ratio"]

Result = dict[str, Any]


def make_report(result: Result, pictures: Iterable[str]) -> str:
    """Return the Markdown page of a finished result.

    Args:
        result: As `run` returns it.
        pictures: Names of files beside it.
    """
    parts = [f"# {result['model']}\n", _source(result), ""]
    parts += [f"- `{name}`: {what}" for name, what in result["methods"].items()]
    if "rows" in result:
        for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
            parts += ["", *_setting(result, setting)]
        parts += _paper_ratios(result)
    else:
        parts += ["", *_sweep(result)]
    parts += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"


def _source(result: Result) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commit = result["commit"]
    at = f" at commit {commit[:9]}" if commit else ""
    changed = ", with changes that were not committed," if result["is_modified"] else ""
    return (
        f"`{result['command']}`{at}{changed} on {result['device']}, {result['date']}, seed "
        f"{result['seed']} ({packages}).{_busy(result)}"
    )


def _busy(result: Result) -> str:
    """Say what the other processes did at the worst while something was timed."""
    timed = [*result.get("rows", ()), *result.get("points", ())]
    noises = [noise["num_cores_of_others"] for row in timed for noise in row.get("noise", ())]
    known = [cores for cores in noises if cores is not None]
    return f" Other processes kept at most {max(known)} cores busy meanwhile." if known else ""


def _table(titles: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(titles)} |",
        "|---|" + "--:|" * (len(titles) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _setting(result: Result, setting: str) -> list[str]:
    rows = [row for row in result["rows"] if row["setting"] == setting]
    ratios = [ratio for ratio in result["ratios"] if ratio["setting"] == setting]
    lines = [
        f"## {setting}",
        "",
        "Milliseconds (median, quartiles of the step) and throughput:",
        "",
    ]
    titles = ["method", "forward", "backward", "optimizer", "step", "tokens/s", "sentences/s"]
    lines += _table(titles, (_times(row) for row in rows))
    lines += ["", "Operations and memory:", ""]
    titles = ["method", "trained", "GFLOP forward", "GFLOP backward", "kept for backward", "peak"]
    lines += _table(titles, (_counts(row) for row in rows))
    if any("saved_bytes_by_kind" in row for row in rows):
        kinds = list(next(r["saved_bytes_by_kind"] for r in rows if "saved_bytes_by_kind" in r))
        lines += ["", "Kept for backward, by kind of module:", ""]
        lines += _table(["method", *kinds], (_kinds(row, kinds) for row in rows))
    if ratios:
        lines += ["", "Ratios of medians, with 95 % intervals:", ""]
        lines += _table(["", "step", "forward", "backward"], map(_ratio, ratios))
    for row in rows:
        if row["status"] != "measured":
            lines += ["", f"`{row['method']}`: {row['status']} ({row['reason']})."]
        elif apart := row.get("timed_apart_from"):
            lines += ["", f"`{row['method']}` did not fit beside {', '.join(apart)}: timed alone."]
    return lines


def _times(row: Result) -> list[str]:
    if "step_ms" not in row:
        return [row["method"], *["-"] * 3, row["status"], "-", "-"]
    step = f"{row['step_ms']:.4g} ({row['step_ms_quartile_1']:.4g}-{row['step_ms_quartile_3']:.4g})"
    phases = [f"{row[f'{name}_ms']:.4g}" for name in ("forward", "backward", "optimizer")]
    rates = [f"{row['tokens_per_second']:,.0f}", f"{row['sentences_per_second']:.3g}"]
    return [row["method"], *phases, step, *rates]


def _counts(row: Result) -> list[str]:
    if "saved_bytes" not in row:
        return [row["method"], "-", "-", "-", "-", row["status"]]
    flops = [row.get(f"{name}_flops") for name in ("forward", "backward")]
    return [
        row["method"],
        f"{row['num_trainable_parameters']:,}",
        *("-" if number is None else f"{number / 1e9:.4g}" for number in flops),
        format_bytes(row["saved_bytes"]),
        "-" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
    ]


def _kinds(row: Result, kinds: list[str]) -> list[str]:
    saved = row.get("saved_bytes_by_kind")
    if saved is None:
        return [row["method"], *["-"] * len(kinds)]
    return [row["method"], *(format_bytes(saved[kind]) for kind in kinds)]


def _ratio(ratio: Result) -> list[str]:
    cells = (_interval(part) for part in (ratio, ratio["forward"], ratio["backward"]))
    return [f"{ratio['method']} / {ratio['reference']}", *cells]


def _interval(ratio: Result) -> str:
    return f"{ratio['ratio']:.3f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def measured_ratio(result: Result, setting: str, stated: paper.PaperRatio) -> float | None:
    """Return here what the paper states of a quantity; None where it was not measured."""
    for ratio in result["ratios"]:
        names = (ratio["setting"], ratio["method"], ratio["reference"])
        if names == (setting, stated.method, stated.reference):
            if stated.quantity == "step":
                return float(ratio["ratio"])
            if stated.quantity in ("forward", "backward"):
                return float(ratio[stated.quantity]["ratio"])
    rows = {row["method"]: row for row in result["rows"] if row["setting"] == setting}
    ours, other = (_quantity(rows.get(m, {}), stated) for m in (stated.method, stated.reference))
    return ours / other if ours and other else None


def _quantity(row: Result, stated: paper.PaperRatio) -> float | None:
    if stated.quantity == "flops":
        return row["forward_flops"] + row["backward_flops"] if "forward_flops" in row else None
    key = "peak_bytes" if stated.quantity == "peak" else f"{stated.quantity}_ms"
    value: float | None = row.get(key)
    return value


def _paper_ratios(result: Result) -> list[str]:
    settings = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    rows = []
    for stated in paper.RATIOS:
        here = [measured_ratio(result, setting, stated) for setting in settings]
        if any(value is not None for value in here):
            name = f"{stated.quantity}: {stated.method} / {stated.reference}"
            cells = ("-" if value is None else f"{value:.2f}" for value in here)
            rows.append([name, f"{stated.ratio:.2f}", *cells, stated.source])
    if not rows:
        return []
    titles = ["", "paper", *settings, "where the paper says so"]
    return ["", "## Beside the paper", "", _CAUTION, "", *_table(titles, rows)]


_CAUTION = (
    "The paper's ratios are of LLaMA3-8B on one A100; those here of this model, device and size."
)


def _sweep(result: Result) -> list[str]:
    is_batch = result["config"]["sweep"] == "batch"
    lines = ["## Largest batch" if is_batch else "## Longest sequence", ""]
    titles = ["method", "limit", "ended by"]
    lines += _table([*titles, "paper"] if not is_batch else titles, map(_limit, result["limits"]))
    if is_batch:
        titles = ["method", "batch", "sentences/s", "tokens/s", "step, ms", "peak"]
        lines += ["", *_table(titles, (_point(p) for p in result["points"] if "step_ms" in p))]
        stated = "; ".join(
            f"{name}: {values.sentences_per_second} sentences/s, {values.rate_ratio} of "
            f"LoRA's, at {values.batch_ratio} of its batch"
            for name, values in fig3.DEVICES.items()
        )
        return [*lines, "", f"The paper's PaCA: {stated} ({paper.THROUGHPUT_SOURCE})."]
    return [*lines, "", f"The paper: {paper.LENGTHS_SOURCE}."]


def _limit(limit: Result) -> list[str]:
    ended = "the largest tried"
    if limit["is_memory_the_limit"]:
        ended = f"memory: {limit['next_failed']} failed ({limit['reason']})"
    row = [limit["method"], f"{limit['limit']:,}", ended]
    if limit["sweep"] == "batch":
        return row
    stated = paper.LENGTHS.get(limit["method"])
    return [*row, "-" if stated is None else f"{stated / 1000:g}K"]


def _point(point: Result) -> list[str]:
    peak = "-" if point["peak_bytes"] is None else format_bytes(point["peak_bytes"])
    return [
        point["method"],
        str(point["num_rows"]),
        f"{point['sentences_per_second']:.3g}",
        f"{point['tokens_per_second']:,.0f}",
        f"{point['step_ms']:.4g}",
        peak,
    ]
