"""Pictures like the paper's Figures 2 and 3, each with what the paper states beside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pacatune.bench.output import PICTURES
from pacatune.paper import fig3
from pacatune.paper import ratios as paper

__all__ = ["save_pictures"]

_GIB = 2**30
Result = dict[str, Any]


def save_pictures(result: Result, folder: Path) -> list[str]:
    """Draw what the result holds; return the names of the files.

    Args:
        result: As `run` returns it.
        folder: Gets the files.
    """
    drawn = []
    for name, draw in zip(
        PICTURES, (_operations, _times, _memory, _throughput, _lengths), strict=True
    ):
        figure = draw(result)
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            drawn.append(name)
    return drawn


def _figure(num_panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: it would choose a window system and keep the figure in global state.
    figure = Figure(figsize=(4.6 * num_panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _stacked(axes: Any, names: Sequence[str], parts: dict[str, list[float]], label: str) -> None:
    bottoms = [0.0] * len(names)
    for part, heights in parts.items():
        axes.bar(names, heights, bottom=bottoms, width=0.6, label=part)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel(label)
    _slant(axes)
    if len(parts) > 1:
        axes.legend(fontsize="small")


def _slant(axes: Any) -> None:
    for label in axes.get_xticklabels():
        label.set(rotation=30, horizontalalignment="right")


def _by_setting(
    result: Result, key: str, draw: Callable[[Any, list[Result]], None], stated: str | None
) -> Any:
    """A panel for each setting whose rows have `key`, and one of the paper's ratios."""
    rows = [row for row in result.get("rows", []) if key in row]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if not settings:
        return None
    figure, panels = _figure(len(settings) + (stated is not None))
    for axes, setting in zip(panels, settings, strict=False):
        draw(axes, [row for row in rows if row["setting"] == setting])
        axes.set_title(setting)
    if stated is not None:
        _paper_ratios(panels[-1], stated)
    return figure


def _paper_ratios(axes: Any, quantities: str) -> None:
    """Bars of the ratios that the paper states in words or tables."""
    ratios = [ratio for ratio in paper.RATIOS if ratio.quantity in quantities.split()][::-1]
    names = [f"{r.quantity}: {r.method} / {r.reference}" for r in ratios]
    bars = axes.barh(names, [ratio.ratio for ratio in ratios], color="grey")
    axes.bar_label(bars, fmt="%.2f", fontsize="small", padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize="small")
    axes.set_title("the paper: LLaMA3-8B, A100\n(ratios that its text states)", fontsize="medium")


def _operations(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        parts = {
            phase: [row[f"{phase}_flops"] / 1e9 for row in rows]
            for phase in ("forward", "backward")
        }
        _stacked(axes, [row["method"] for row in rows], parts, "GFLOP")

    return _by_setting(result, "forward_flops", draw, "flops")


def _times(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        names = [row["method"] for row in rows]
        phases = ("forward", "backward", "optimizer")
        parts = {phase: [row[f"{phase}_ms"] for row in rows] for phase in phases}
        _stacked(axes, names, parts, "ms (medians; quartiles of the step)")
        for place, row in enumerate(rows):
            low, high = row["step_ms_quartile_1"], row["step_ms_quartile_3"]
            axes.vlines(place, low, high, color="black", linewidth=1.5)

    return _by_setting(result, "step_ms", draw, "step forward backward")


def _memory(result: Result) -> Any:
    def draw(axes: Any, rows: list[Result]) -> None:
        kinds = list(rows[0]["saved_bytes_by_kind"])
        parts = {kind: [row["saved_bytes_by_kind"][kind] / _GIB for row in rows] for kind in kinds}
        _stacked(axes, [row["method"] for row in rows], parts, "GiB kept for backward")

    return _by_setting(result, "saved_bytes_by_kind", draw, "peak")


def _throughput(result: Result) -> Any:
    points = [point for point in result.get("points", []) if "step_ms" in point]
    if not points:
        return None
    figure, (axes, beside) = _figure(2)
    for limit in result["limits"]:
        own = [point for point in points if point["method"] == limit["method"]]
        batches = [point["num_rows"] for point in own]
        rates = [point["sentences_per_second"] for point in own]
        (line,) = axes.plot(batches, rates, "o-", label=limit["method"])
        if own and limit["is_memory_the_limit"]:
            axes.plot(limit["next_failed"], rates[-1], "x", color=line.get_color())
    axes.set(xlabel="batch (x: out of memory)", ylabel="sentences/s", title=result["device"])
    axes.legend(fontsize="small")
    names = list(fig3.DEVICES)
    for place, key in enumerate(("rate_ratio", "batch_ratio")):
        ratios = [getattr(fig3.DEVICES[name], key) for name in names]
        places = [number + 0.4 * place - 0.2 for number in range(len(names))]
        beside.bar(places, ratios, width=0.35, label=key.split("_")[0])
    beside.set_xticks(range(len(names)), names)
    beside.axhline(1, color="black", linewidth=0.8)
    beside.legend(fontsize="small")
    beside.set_title("the paper: PaCA / LoRA at their best\n(LLaMA3-8B)", fontsize="medium")
    return figure


def _lengths(result: Result) -> Any:
    if result["config"]["sweep"] != "seq-len":
        return None
    figure, (axes, beside) = _figure(2)
    limits = {limit["method"]: limit["limit"] for limit in result["limits"]}
    axes.bar(list(limits), list(limits.values()), width=0.6)
    axes.set(ylabel="longest sequence, tokens", title=result["device"])
    _slant(axes)
    beside.bar(list(paper.LENGTHS), list(paper.LENGTHS.values()), 0.6, color="grey")
    beside.set_title("the paper: LLaMA3-8B, A100 (Table 4)", fontsize="medium")
    return figure
