"""Draw the pictures of README and docs, light and dark, from the committed results.

python -m tools.picture

    method  a weight, its trained columns, and what of the input is kept for them
    step    the time of a step, PaCA's as a share of LoRA's; what a layer keeps for backward
    sync    what a sampler is from its trainer, what a sync sends, and what a token costs
    groups  what arms of the study of row groups keep for backward, and their scores
"""

import json
import statistics
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.patches import Rectangle

from benchmarks.results import RESULTS, ROOT, read
from benchmarks.studies import rows_of
from pacatune.reports.figures import new_figure
from pacatune.reports.rows import Row

FOLDER = ROOT / "docs" / "pictures"
_THEMES = {"light": ("#1f2328", "#0969da", "#8c959f"), "dark": ("#e6edf3", "#4493f8", "#6e7681")}
_SETTINGS = ("512 tokens", "2048 tokens")
_DTYPES = ("float32", "bfloat16")
_FAR = 0.08  # of a score from the median
_KEPT = "kept for backward"
_SYNCED = {
    "paca": "PaCA's columns",
    "lora": "LoRA, merged",
    "lora-adapter": "LoRA, beside",
    "full": "full",
}


def shares() -> dict[str, Row]:
    """Return PaCA's step as a share of LoRA's by what was trained on."""
    rows = {row.setting: row for row in read("step").rows if row.method == "paca / lora"}
    return {name: rows[name] for name in (f"{s}, {d}" for s in _SETTINGS for d in _DTYPES)}


def kept() -> dict[str, tuple[float, float]]:
    """Return the bytes that PaCA and LoRA keep per token, layer and channel, by lean level."""
    rows = {(row.setting, row.method): row.value for row in read("lean").rows}
    levels = ("plain", "level 1", "level 2", "level 3")
    return {level: (rows[level, "paca"], rows[level, "lora"]) for level in levels}


def synced() -> dict[str, dict[str, float]]:
    """Return what each panel of the second picture shows of each way to sync a sampler."""
    rows = {(r.what, r.method, r.model or r.setting): r.value for r in read("rl_sync").rows}

    def of(what: str, where: str, default: float | None = None, scale: float = 1.0) -> Any:
        return {title: scale * rows.get((what, m, where), default) for m, title in _SYNCED.items()}

    return {
        "mean |log p_train - log p_sample|": of("gap, same tokens", "transformers"),
        "GiB per sync, LLaMA3-8B": of("sent per sync", "llama3-8b", scale=2**-30),
        # Merged weights are the base's.
        "time per output token, base = 1": of("token / base", "transformers", 1.0),
    }


def groups() -> dict[str, dict[str, tuple[float, float]]]:
    """Return what each arm keeps, PaCA's = 1, and its score, of each study of row groups."""
    found = {}
    known = json.loads((RESULTS / "groups.json").read_text(encoding="utf-8"))
    for name, study in known.items():
        rows = {(row.what, row.method): row.value for row in rows_of(name, study)}
        score = next(what for what, _ in rows if what.startswith("test "))
        title = f"{name.removeprefix('groups-')}, {score}"
        if not name.startswith("groups-rate"):
            kept = rows[_KEPT, "paca"]
            arms = [arm for arm in study["arms"] if "normalized" not in arm and "pool" not in arm]
            found[title] = {arm: (rows[_KEPT, arm] / kept, rows[score, arm]) for arm in arms}
    return found


def draw(name: str, theme: str, folder: Path) -> Path:
    """Draw a picture in the colours of a theme; return its path."""
    options = dict.fromkeys(("text.color", "xtick.color", "ytick.color"), _THEMES[theme][0])
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "pacatune", "font.size": 9}
    with matplotlib.rc_context({**options, **fixed}):
        draw_it, height = _PICTURES[name]
        figure = new_figure(8.4, height)
        draw_it(figure, *_THEMES[theme])
        path = folder / f"{name}-{theme}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def _draw_method(figure: Any, text: str, ours: str, theirs: str) -> None:
    axes = figure.add_subplot()
    trained, num_inputs, num_outputs = (2, 5, 11), 14, 7
    for column in range(num_inputs):
        colour = ours if column in trained else theirs
        for row in range(num_outputs):
            axes.add_patch(Rectangle((column, -row), 0.9, 0.9, color=colour))
        axes.add_patch(Rectangle((column, 2.2), 0.9, 0.9, color=colour))
    for row in range(num_outputs):
        axes.add_patch(Rectangle((num_inputs + 1.2, -row), 0.9, 0.9, color=theirs))
    words = {"color": text, "fontsize": 9, "va": "center"}
    beside = num_inputs + 3.4
    axes.text(-0.4, 2.65, "input x", ha="right", **words)
    axes.text(-0.4, -2.5, "weight W", ha="right", **words)
    axes.text(num_inputs + 0.55, -2.5, "=", ha="center", **words)
    axes.text(beside, -2.5, "output y = W x: one product, of one weight", **words)
    axes.text(beside, 2.65, f"{len(trained)} of {num_inputs} channels kept for backward", **words)
    columns = f"{len(trained)} of {num_inputs} columns trained, in place"
    axes.text(beside, -4.2, columns, **{**words, "color": ours})
    axes.text(beside, -5.9, "the others stay as they were pretrained", **{**words, "color": theirs})
    axes.set(xlim=(-5, 42), ylim=(-6.6, 3.6), aspect="equal")
    axes.set_axis_off()


def _draw_step(figure: Any, text: str, ours: str, theirs: str) -> None:
    left, right = figure.subplots(1, 2)
    found = shares()
    _bars(left, list(found), [(row.value, 1.0) for row in found.values()], (ours, theirs))
    for place, row in enumerate(found.values()):
        left.plot([row.low, row.high], [place - 0.2] * 2, color=text, linewidth=1)
    left.set_title("step time, LoRA's = 1 (line: 95 % interval)", fontsize=9)
    _bars(right, list(kept()), list(kept().values()), (ours, theirs))
    right.set_title("bytes kept per token, layer and channel", fontsize=9)
    figure.legend(
        right.containers, ["PaCA", "LoRA"], loc="outside lower center", ncols=2, frameon=False
    )


def _draw_sync(figure: Any, text: str, ours: str, theirs: str) -> None:
    for number, (title, values) in enumerate(synced().items()):
        axes, places = figure.add_subplot(1, 3, number + 1), range(len(values))
        axes.barh(places, values.values(), color=[ours] + [theirs] * (len(values) - 1))
        for place, value in zip(places, values.values(), strict=True):
            axes.text(value, place, f" {value:.3g}", color=text, fontsize=8, va="center_baseline")
        axes.set_yticks(places, [""] * len(values) if number else values)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
        _bare(axes)


def _draw_groups(figure: Any, text: str, ours: str, theirs: str) -> None:
    panels = groups()
    for number, (title, arms) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number + 1)
        middle = statistics.median(score for _, score in arms.values())
        near = [score for _, score in arms.values() if abs(score / middle - 1) < _FAR]
        for beside, (name, (kept, score)) in zip(cycle((4, -9)), arms.items(), strict=False):
            place = min(max(score, min(near)), max(near))  # at the edge a method that has failed
            colour = ours if name.startswith(("paca", "groups")) else theirs
            axes.plot(kept, place, "o" if place == score else "v", color=colour)
            label, side = (name, "left") if place == score else (f"{name} {score:.3g}  ", "right")
            offset = {"xytext": (4, beside), "textcoords": "offset points"}
            axes.annotate(label, (kept, place), **offset, fontsize=7, ha=side)
        axes.margins(x=0.2, y=0.1)
        if "loss" in title:
            axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("kept for backward, PaCA = 1", color=text)


def _bars(axes: Any, names: list[str], pairs: list[tuple[float, float]], colours: Any) -> None:
    """Draw two bars for each name, the first at the top, each with its number in it."""
    for offset, colour, values in zip((-0.2, 0.2), colours, zip(*pairs, strict=True), strict=True):
        places = [place + offset for place in range(len(names))]
        axes.barh(places, values, height=0.38, color=colour)
        for place, value in zip(places, values, strict=True):
            axes.text(0, place, f"  {value:.3g}", color="white", fontsize=8, va="center_baseline")
    axes.set_yticks(range(len(names)), names)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)


_PICTURES = {
    "method": (_draw_method, 1.9),
    "step": (_draw_step, 2.5),
    "sync": (_draw_sync, 1.7),
    "groups": (_draw_groups, 6.0),
}
"""Name -> what draws it, and its height in inches."""


def main() -> None:
    """Draw all."""
    for name in _PICTURES:
        for theme in _THEMES:
            print(f"wrote {draw(name, theme, FOLDER)}")


if __name__ == "__main__":
    sys.exit(main())
