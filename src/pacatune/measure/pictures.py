"""Pictures of measurements and estimates; those of measurements have the paper's numbers beside."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pacatune.measure.bench import PICTURES
from pacatune.measure.estimate import Estimate
from pacatune.measure.report import Result, measured_ratio
from pacatune.measure.step import PHASES
from pacatune.measure.tracker import CATEGORIES
from pacatune.paper import fig3
from pacatune.paper import ratios as paper
from pacatune.reports.figures import new_figure, save_figure

_GIB = 2**30
# Parts below this share of the tallest bar have no room for a number.
_LEAST_LABELLED = 0.045
_INCHES_PER_BAR = 0.15
# Matplotlib's Set2: light enough for numbers on top.
_PASTEL = ("#66c2a5", "#fc8d62", "#8da0cb", "#e78ac3", "#a6d854", "#ffd92f", "#e5c494", "#b3b3b3")


def save_pictures(result: Result, folder: Path) -> list[str]:
    """Draw in a folder what the result holds; return the names of the files."""
    draws = (_operations, _times, _memory, _throughput, _lengths)
    figures = {name: draw(result) for name, draw in zip(PICTURES, draws, strict=True)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return list(drawn)


def _panels(num_panels: int) -> tuple[Any, list[Any]]:
    figure = new_figure(4.6 * num_panels, 4.2)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _stacked(axes: Any, names: Sequence[str], parts: dict[str, list[float]], label: str) -> None:
    """Draw a bar of parts for each name; parts with room for it have their number on them."""
    bottoms = [0.0] * len(names)
    tallest = max(map(sum, zip(*parts.values(), strict=True)), default=0.0)
    for part, heights, color in zip(parts, parts.values(), itertools.cycle(_PASTEL)):
        bars = axes.bar(names, heights, bottom=bottoms, width=0.6, label=part, color=color)
        room = _LEAST_LABELLED * tallest
        numbers = [f"{h:#.3g}".rstrip(".") if h > room else "" for h in heights]
        axes.bar_label(bars, numbers, label_type="center", fontsize="x-small")
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel(label)


def _side_by_side(axes: Any, names: Sequence[str], series: dict[str, list[float | None]]) -> None:
    """Draw bars of several origins for each name, each with its value; the paper's are grey."""
    height, greys = 0.8 / len(series), iter(("0.55", "0.75"))
    for place, (label, values) in enumerate(series.items()):
        known = [(number, value) for number, value in enumerate(values) if value is not None]
        if not known:
            continue
        places = [number + height * (place - (len(series) - 1) / 2) for number, _ in known]
        color = next(greys) if label.startswith("paper") else None
        bars = axes.barh(places, [value for _, value in known], height, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)
    room = _INCHES_PER_BAR * len(series) * len(names) / 0.8 + 1.8
    axes.figure.set_figheight(max(axes.figure.get_figheight(), room))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.08))


def _slant(axes: Any) -> None:
    for label in axes.get_xticklabels():
        label.set(rotation=30, horizontalalignment="right")


def _by_setting(
    result: Result, key: str, draw: Callable[[Any, list[Result]], None], quantities: str
) -> Any:
    """Draw a panel for each setting whose rows have `key`, and one of the paper's ratios.

    The `quantities` of these have spaces between.
    """
    rows = [row for row in result.get("rows", []) if key in row]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if not settings:
        return None
    figure, panels = _panels(len(settings) + 1)
    for axes, setting in zip(panels, settings, strict=False):
        draw(axes, [row for row in rows if row["setting"] == setting])
        _slant(axes)
        axes.margins(y=0.3)  # room for the legend
        axes.legend(fontsize="small", ncols=2, loc="upper left")
        axes.set_title(setting)
    _paper_ratios(panels[-1], result, settings, quantities.split())
    return figure


def _paper_ratios(
    axes: Any, result: Result, settings: list[str], quantities: Collection[str]
) -> None:
    """Draw the ratios that the paper states in words or tables, and ours where measured."""
    stated = [ratio for ratio in paper.RATIOS if ratio.quantity in quantities]
    ours = {s: {r: measured_ratio(result, s, r) for r in stated} for s in settings}
    measured = [r for r in stated if any(found[r] is not None for found in ours.values())]
    ratios = measured or stated
    series: dict[str, list[float | None]] = {"paper: LLaMA3-8B, A100": [r.ratio for r in ratios]}
    series |= {f"here: {s}": [found[r] for r in ratios] for s, found in ours.items()}
    names = [f"{r.quantity}: {r.method} / {r.reference}" for r in ratios]
    _side_by_side(axes, names, series)
    axes.set_title("ratios that the paper states,\nand those measured here", fontsize="medium")


def _operations(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        parts = {phase: [row[f"{phase}_flops"] / 1e9 for row in rows] for phase in PHASES[:2]}
        _stacked(axes, [row["method"] for row in rows], parts, "GFLOP")

    return _by_setting(result, "forward_flops", draw, "flops")


def _times(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        names = [row["method"] for row in rows]
        parts = {phase: [row[f"{phase}_ms"] for row in rows] for phase in PHASES}
        _stacked(axes, names, parts, "ms (medians; quartiles of the step)")
        for place, row in enumerate(rows):
            low, high = row["step_ms_quartile_1"], row["step_ms_quartile_3"]
            axes.vlines(place + 0.22, low, high, color="black", linewidth=1.5)

    return _by_setting(result, "step_ms", draw, "step forward backward")


def _memory(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        kept = [row["saved_bytes_by_kind"] for row in rows]
        is_large = max(sum(one.values()) for one in kept) >= _GIB
        unit, size = ("GiB", _GIB) if is_large else ("MiB", 2**20)
        parts = {kind: [one[kind] / size for one in kept] for kind in kept[0]}
        _stacked(axes, [row["method"] for row in rows], parts, f"{unit} kept for backward")

    return _by_setting(result, "saved_bytes_by_kind", draw, "peak")


def _throughput(result: Result) -> Any:
    points = [point for point in result.get("points", []) if "step_ms" in point]
    if not points:
        return None
    figure, (axes, beside) = _panels(2)
    for limit in result["limits"]:
        own = [point for point in points if point["method"] == limit["method"]]
        batches = [point["num_rows"] for point in own]
        rates = [point["sentences_per_second"] for point in own]
        (line,) = axes.plot(batches, rates, "o-", label=limit["method"])
        if own and limit["is_memory_the_limit"]:
            axes.plot(limit["next_failed"], rates[-1], "x", color=line.get_color())
    axes.set(xlabel="batch (x: out of memory)", ylabel="sentences/s", title=result["device"])
    axes.legend(fontsize="small")
    series: dict[str, list[float | None]] = {
        f"paper: LLaMA3-8B, {name}": [values.rate_ratio, values.batch_ratio]
        for name, values in fig3.DEVICES.items()
    }
    _side_by_side(beside, ["sentences/s", "batch"], series | {"here": _best(result, points)})
    beside.set_title("paca / lora, each at its largest batch", fontsize="medium")
    return figure


def _best(result: Result, points: list[Result]) -> list[float | None]:
    """Return PaCA's rate and batch as shares of LoRA's, at the largest batch of each."""
    limits = {limit["method"]: limit for limit in result["limits"]}
    at_limit = {
        point["method"]: point
        for point in points
        if point["num_rows"] == limits[point["method"]]["limit"]
    }
    if not {"paca", "lora"} <= at_limit.keys():
        return [None, None]
    ours, other = at_limit["paca"], at_limit["lora"]
    rate = ours["sentences_per_second"] / other["sentences_per_second"]
    is_memory = limits["paca"]["is_memory_the_limit"] and limits["lora"]["is_memory_the_limit"]
    return [rate, ours["num_rows"] / other["num_rows"] if is_memory else None]


def _lengths(result: Result) -> Any:
    if result["config"]["sweep"] != "seq-len":
        return None
    figure, (axes, beside) = _panels(2)
    limits = {limit["method"]: limit["limit"] for limit in result["limits"]}
    bars = axes.bar(list(limits), list(limits.values()), width=0.6)
    axes.bar_label(bars, [f"{limit:,}" for limit in limits.values()], fontsize="small")
    axes.set(ylabel="longest sequence, tokens", title=result["device"])
    _slant(axes)
    names = [f"{name} ({number / 1000:g}K)" for name, number in paper.LENGTHS.items()]
    shares: dict[str, list[float | None]] = {
        label: [
            found[name] / found["lora"] if name in found and found.get("lora") else None
            for name in paper.LENGTHS
        ]
        for label, found in (("paper: LLaMA3-8B, A100 (Table 4)", paper.LENGTHS), ("here", limits))
    }
    _side_by_side(beside, names, shares)
    beside.set_title(
        "longest sequence / lora's\n(in brackets: the paper's tokens)", fontsize="medium"
    )
    return figure


def save_plot(
    estimates: Mapping[str, Estimate],
    path: Path,
    available_bytes: int | None,
    device: str = "available",
) -> None:
    """Draw a bar of what each estimate's peak consists of, its spread, and the device's memory."""
    figure, (axes,) = _panels(1)
    figure.set_size_inches(3.6 + 1.1 * len(estimates), 4.6)
    title, names = _title_and_names(estimates)
    parts = {
        category: [e.measured.by_category.get(category, 0) / _GIB for e in estimates.values()]
        for category in CATEGORIES
    }
    _stacked(
        axes,
        names,
        {category: heights for category, heights in parts.items() if any(heights)},
        "GiB at the peak (bar); needed on the device (range)",
    )
    for position, estimate in enumerate(estimates.values()):
        low, high = estimate.low_bytes / _GIB, estimate.high_bytes / _GIB
        axes.vlines(position, low, high, color="black", linewidth=1.5)
        axes.hlines((low, high), position - 0.1, position + 0.1, color="black", linewidth=1.5)
        text = f"{estimate.peak_bytes / _GIB:.2f}\n({low:.2f} to {high:.2f})"
        axes.annotate(
            text,
            (position, high),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
            bbox={"color": "white", "pad": 0.5},
        )
    axes.margins(y=0.12)
    if available_bytes is not None:
        gib = available_bytes / _GIB
        axes.axhline(gib, color="black", linestyle="--", linewidth=1)
        axes.text(
            1.01,
            gib,
            f"{device}:\n{gib:.1f} GiB",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
        )
    axes.set_title(title, fontsize="medium")
    figure.legend(fontsize="small", frameon=False, loc="outside right upper")
    save_figure(figure, path, dpi=150)


def _title_and_names(estimates: Mapping[str, Estimate]) -> tuple[str, list[str]]:
    """Return a title with the sizes that all bars share, and names with those that they do not."""
    settings = [estimate.setting for estimate in estimates.values()]
    names, shared = list(estimates), []
    for field, words in (("batch_size", "batch"), ("seq_len", "tokens"), ("rank", "rank")):
        sizes = [getattr(setting, field) for setting in settings]
        if len(set(sizes)) == 1:
            shared.append(f"{words} {sizes[0]:,}")
        else:
            names = [f"{name}\n{words} {size:,}" for name, size in zip(names, sizes, strict=True)]
    model = Path(settings[0].model).name if settings else ""
    return f"{model}: memory of a training step\n{', '.join(shared)}", names
