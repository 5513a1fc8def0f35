"""Draw the pictures of README and docs, light and dark, from the committed results.

python -m tools.picture

    method  a weight, its trained columns, and what of the input is kept for them
    step    the time of a step, PaCA's as a share of LoRA's; what a layer keeps for backward
    sync    what a sampler is from its trainer, what a sync sends, and what a token costs
    groups  what arms of the study of row groups keep for backward, and their scores
    packed  scores in a file of 4 bits against the bytes that were changed in it
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
_LORAS = {"lora": "LoRA, as Trainer runs it", "lora_bf16": "LoRA, bfloat16 adapters"}
_FAR = 0.08  # of a score from the median
_KEPT = "kept for backward"
_SYNCED = {
    "paca": "PaCA's columns",
    "lora": "LoRA, merged",
    "lora-adapter": "LoRA, beside",
    "full": "full",
}


def shares() -> dict[str, dict[str, Row]]:
    """Return PaCA's step as a share of each LoRA's, in every setting that was measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in read("step").rows:
        if row.method in (names := {f"paca / {lora}": title for lora, title in _LORAS.items()}):
            found.setdefault(row.setting, {})[names[row.method]] = row
    return found


def kept() -> dict[str, dict[str, float]]:
    """Return the bytes that each keeps per token, layer and channel, by lean level."""
    rows = {(row.setting, row.method): row.value for row in read("lean").rows}
    levels = ("plain", "level 1", "level 2", "level 3")
    names = {"paca": "PaCA"} | _LORAS
    return {level: {t: rows[level, name] for name, t in names.items()} for level in levels}


def synced() -> dict[str, dict[str, float]]:
    """Return what each panel of the picture of syncs shows of each way, where it was measured."""
    rows = {(r.what, r.method, r.model or r.setting): r.value for r in read("rl_sync").rows}

    def of(what: str, where: str, scale: float = 1.0) -> dict[str, float]:
        known = {title: rows.get((what, name, where)) for name, title in _SYNCED.items()}
        return {title: scale * value for title, value in known.items() if value is not None}

    return {
        "mean |log p| gap of what vLLM draws": of("sampling_logp_difference, mean", "vLLM"),
        "MiB per sync, SmolLM2-135M": of("sent per sync", "SmolLM2-135M", 2**-20),
        "time per output token, base = 1": of("token / base", "transformers"),
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


def packed() -> dict[str, dict[str, dict[str, Row]]]:
    """Return score and changed bytes of what is in the file, and the score as trained, by task."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in read("packed").rows:
        if row.setting.startswith("Q4_1, words") and "rate" not in row.setting:
            found.setdefault(row.setting, {}).setdefault(row.method, {})[row.what] = row
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
    settings, made = shares(), read("step").provenance
    for offset, title, marker in zip((-0.15, 0.15), _LORAS.values(), "os", strict=True):
        for place, rows in enumerate(settings.values()):
            if (row := rows.get(title)) is not None:
                at = place + offset
                left.plot([row.low, row.high], [at] * 2, color=theirs, linewidth=1)
                left.plot(row.value, at, marker, color=ours, markersize=4)
                left.text(row.high, at, f" {row.value:.3g}", fontsize=7, va="center_baseline")
    left.axvline(1, color=text, linewidth=0.8)
    left.set_yticks(range(len(settings)), settings)
    left.set_title("PaCA's step / LoRA's (95 % intervals)", fontsize=9)
    left.set_xlabel(f"o as Trainer runs it, s bfloat16 adapters; {made['device']}", fontsize=7)
    left.margins(x=0.15)
    left.invert_yaxis()
    for spine in left.spines.values():
        spine.set_visible(False)
    colours = (ours, theirs, text)
    for number, (title, colour) in enumerate(zip(("PaCA", *_LORAS.values()), colours, strict=True)):
        places = [place + 0.27 * (number - 1) for place in range(len(kept()))]
        values = [levels[title] for levels in kept().values()]
        right.barh(places, values, height=0.25, color=colour, label=title)
        for place, value in zip(places, values, strict=True):
            right.text(value, place, f" {value:.3g}", fontsize=7, va="center_baseline")
    right.set_yticks(range(len(kept())), list(kept()))
    right.set_title("bytes kept per token, layer and channel (counted)", fontsize=9)
    right.legend(frameon=False, fontsize=7)
    right.margins(x=0.15)
    _bare(right)


def _draw_sync(figure: Any, text: str, ours: str, theirs: str) -> None:
    for number, (title, values) in enumerate(synced().items()):
        axes, places = figure.add_subplot(1, 3, number + 1), range(len(values))
        axes.barh(places, values.values(), color=[ours] + [theirs] * (len(values) - 1))
        for place, value in zip(places, values.values(), strict=True):
            axes.text(value, place, f" {value:.3g}", color=text, fontsize=8, va="center_baseline")
        axes.set_yticks(places, values, fontsize=8)
        axes.set_title(title, fontsize=8)
        axes.margins(x=0.25)
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


def _draw_packed(figure: Any, text: str, ours: str, theirs: str) -> None:
    panels, shown = packed(), {"paca": 0, "lora": 9, "full": -9}
    for number, (title, methods) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for name, shift in shown.items():
            rows, colour = methods[name], ours if name == "paca" else theirs
            score, changed = rows["score"], rows["bytes changed"].value
            axes.plot([changed] * 2, [score.low, score.high], color=colour, linewidth=1)
            axes.plot(changed, score.value, "o", color=colour)
            trained = rows["score as trained"].value
            axes.plot(changed, trained, "o", color=colour, fillstyle="none")
            beside = {"xytext": (7, shift), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(name, (changed, score.value), va="center", **beside)
        axes.set_xlim(0, 9)
        axes.set_title(f"{title}: exact answers, %; hollow: as trained", fontsize=8)
        axes.set_xlabel("bytes of the file that were changed, %", color=text, fontsize=8)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)


_PICTURES = {
    "method": (_draw_method, 1.9),
    "step": (_draw_step, 3.4),
    "sync": (_draw_sync, 1.7),
    "groups": (_draw_groups, 6.0),
    "packed": (_draw_packed, 2.6),
}
"""Name -> what draws it, and its height in inches."""


def main() -> None:
    """Draw all."""
    for name in _PICTURES:
        for theme in _THEMES:
            print(f"wrote {draw(name, theme, FOLDER)}")


if __name__ == "__main__":
    sys.exit(main())
