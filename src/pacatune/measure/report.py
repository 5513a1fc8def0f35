"""The result as a page: tables of what was measured, with the paper's own numbers beside."""

from collections.abc import Iterable
from typing import Any

from pacatune.files.folder import format_bytes
from pacatune.paper import fig3
from pacatune.paper import ratios as paper
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.tables import table_lines

Result = dict[str, Any]
_CAUTION = (
    "The paper's ratios are of LLaMA3-8B on one A100; those here of this model, device and size."
)


def make_report(result: Result, pictures: Iterable[str]) -> str:
    """Return the Markdown page of a finished result, and of pictures beside it."""
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
    return (
        f"`{result['command']}`{commit_text(result)} on {result['device']}, {result['date']}, seed "
        f"{result['seed']} ({versions_text(result['versions'])}).{_busy(result)}"
    )


def _busy(result: Result) -> str:
    """Say what the other processes did at the worst while something was timed."""
    timed = [*result.get("rows", ()), *result.get("points", ())]
    noises = [noise["num_cores_of_others"] for row in timed for noise in row.get("noise", ())]
    known = [cores for cores in noises if cores is not None]
    return f" Other processes kept at most {max(known)} cores busy meanwhile." if known else ""


def _setting(result: Result, setting: str) -> list[str]:
    rows = [row for row in result["rows"] if row["setting"] == setting]
    ratios = [ratio for ratio in result["ratios"] if ratio["setting"] == setting]
    titles = ["method", "forward", "backward", "optimizer", "step", "tokens/s", "sentences/s"]
    times = table_lines(titles, map(_times, rows))
    titles = ["method", "trained", "GFLOP forward", "GFLOP backward", "kept for backward", "peak"]
    counts = table_lines(titles, map(_counts, rows))
    lines = [f"## {setting}", ""]
    lines += ["Milliseconds (median, quartiles of the step) and throughput:", "", *times]
    lines += ["", "Operations and memory:", "", *counts]
    kinds = next((list(r["saved_bytes_by_kind"]) for r in rows if "saved_bytes_by_kind" in r), [])
    if kinds:
        lines += ["", "Kept for backward, by kind of module:", ""]
        lines += table_lines(["method", *kinds], (_kinds(row, kinds) for row in rows))
    if ratios:
        lines += ["", "Ratios of medians, with 95 % intervals:", ""]
        lines += table_lines(["", "step", "forward", "backward"], map(_ratio, ratios))
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
        return [row["method"], *["-"] * 4, row["status"]]
    flops = [row.get(f"{name}_flops") for name in ("forward", "backward")]
    return [
        row["method"],
        f"{row['num_trainable_parameters']:,}",
        *("-" if number is None else f"{number / 1e9:.4g}" for number in flops),
        format_bytes(row["saved_bytes"]),
        _peak(row),
    ]


def _peak(row: Result) -> str:
    return "-" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"])


def _kinds(row: Result, kinds: list[str]) -> list[str]:
    saved = row.get("saved_bytes_by_kind", {})
    return [row["method"], *(format_bytes(saved[kind]) if saved else "-" for kind in kinds)]


def _ratio(ratio: Result) -> list[str]:
    return [
        f"{ratio['method']} / {ratio['reference']}",
        *(
            f"{part['ratio']:.3f} ({part['low']:.2f}-{part['high']:.2f})"
            for part in (ratio, ratio["forward"], ratio["backward"])
        ),
    ]


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
    return ["", "## Beside the paper", "", _CAUTION, "", *table_lines(titles, rows)]


def _sweep(result: Result) -> list[str]:
    titles = ["method", "limit", "ended by"]
    if result["config"]["sweep"] != "batch":
        table = table_lines([*titles, "paper"], map(_length, result["limits"]))
        return ["## Longest sequence", "", *table, "", f"The paper: {paper.LENGTHS_SOURCE}."]
    lines = ["## Largest batch", "", *table_lines(titles, map(_limit, result["limits"])), ""]
    titles = ["method", "batch", "sentences/s", "tokens/s", "step, ms", "peak"]
    lines += table_lines(titles, (_point(p) for p in result["points"] if "step_ms" in p))
    stated = "; ".join(
        f"{name}: {values.sentences_per_second} sentences/s, {values.rate_ratio} of "
        f"LoRA's, at {values.batch_ratio} of its batch"
        for name, values in fig3.DEVICES.items()
    )
    return [*lines, "", f"The paper's PaCA: {stated} ({paper.THROUGHPUT_SOURCE})."]


def _limit(limit: Result) -> list[str]:
    ended = "the largest tried"
    if limit["is_memory_the_limit"]:
        ended = f"memory: {limit['next_failed']} failed ({limit['reason']})"
    return [limit["method"], f"{limit['limit']:,}", ended]


def _length(limit: Result) -> list[str]:
    stated = paper.LENGTHS.get(limit["method"])
    return [*_limit(limit), "-" if stated is None else f"{stated / 1000:g}K"]


def _point(point: Result) -> list[str]:
    return [
        point["method"],
        str(point["num_rows"]),
        f"{point['sentences_per_second']:.3g}",
        f"{point['tokens_per_second']:,.0f}",
        f"{point['step_ms']:.4g}",
        _peak(point),
    ]
