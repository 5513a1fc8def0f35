"""Draw the pictures of README and docs, light and dark, from the committed results.

python -m tools.picture

    first   what PaCA and LoRA keep per token, and the longest sequence that fits
    method  from PaCA to LoRA: trained columns, what of the input is kept, and what is trained
    step    the time of a step, PaCA's as a share of LoRA's; what a layer keeps for backward
    sync    what a sampler is from its trainer, what a sync sends, and what a token costs
    frontier  test loss of the arms of the dial, and what they cost
    packed  scores in a file of 4 bits against the bytes that were changed in it
"""

import statistics
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.patches import Rectangle

from benchmarks import verdict
from benchmarks.results import ROOT, read
from benchmarks.study_runs import TASKS, is_paca
from pacatune.reports.figures import new_figure
from pacatune.reports.rows import Row, spread_of_mean

FOLDER = ROOT / "docs" / "pictures"
_THEMES = {"light": ("#1f2328", "#0969da", "#8c959f"), "dark": ("#e6edf3", "#4493f8", "#6e7681")}
_LORAS = {"lora": "LoRA, as Trainer runs it", "lora_bf16": "LoRA, bfloat16 adapters"}
_COSTS = {
    "kept": "kept for backward, lora16 = 1",
    "step": "time of a step, lora16 = 1",
    "state": "state of LLaMA3-8B, lora16 = 1",
}
_SYNCED = {
    "paca": "PaCA's columns",
    "lora": "LoRA, merged",
    "lora-adapter": "LoRA, beside the weights",
    "full": "full fine-tuning",
}
_SENT = "MiB per sync, 200 steps of GRPO"


def first() -> dict[str, dict[str, float]]:
    """Return what each panel of the first picture shows of each method, at the default level."""
    rows = {(r.what, r.method): r.value for r in read("lengths").rows if r.setting == "level 1"}
    names = {"paca": "PaCA", "lora": "LoRA, float32 adapters"}
    names["lora_bf16"] = "LoRA, bfloat16 adapters"
    panels = {"kept for backward, MiB per token": ("kept per token", 2**-20)}
    panels["longest sequence in 80 GB, thousand tokens"] = ("longest sequence", 1e-3)
    return {
        title: {label: scale * rows[what, name] for name, label in names.items()}
        for title, (what, scale) in panels.items()
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

    def of(what: str, where: str, scale: float = 1.0, file: str = "rl_sync") -> dict[str, float]:
        rows = {(r.what, r.method, r.setting): r.value for r in read(file).rows}
        known = {title: rows.get((what, name, where)) for name, title in _SYNCED.items()}
        return {title: scale * value for title, value in known.items() if value is not None}

    return {
        "mean |log p| gap of what vLLM draws": of("sampling_logp_difference, mean", "vLLM"),
        _SENT: of("sent per sync", "vLLM", 2**-20, "rl_run"),
        "time per token, transformers, base = 1": of("token / base", "transformers"),
        "time per token, vLLM (CPU), base = 1": of("token / base", "vLLM"),
    }


def frontier() -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """Return of each arm of the dial its cost, `lora16`'s = 1, test loss and half its interval.

    By task, and by what the cost is of: so many panels for each task.
    """
    found: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for task, study in verdict.studies().items():
        losses = verdict.losses_of(verdict.arms_of(study))
        reached = {
            arm: (statistics.mean(some), spread_of_mean(some)) for arm, some in losses.items()
        }
        found[TASKS[task]] = {
            what: {arm: (costs[arm] / costs["lora16"], *reached[arm]) for arm in reached}
            for what, costs in verdict.costs_of(task).items()
        }
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
    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    options = dict.fromkeys(coloured, _THEMES[theme][0])
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
    num_inputs, num_outputs, rank = 12, 6, 3
    forms = {
        "PaCA: r columns": (1, 4, 9),
        "channels: c columns, rank r": (0, 1, 4, 6, 9, 10),
        "all channels: LoRA, in place": tuple(range(num_inputs)),
    }
    words = {"color": text, "fontsize": 8, "va": "center"}
    for number, (title, trained) in enumerate(forms.items()):
        axes = figure.add_subplot(1, len(forms), number + 1)
        parts = [(0, 2.4, num_inputs, 1, trained), (0, 0.6, num_inputs, num_outputs, trained)]
        parts.append((0, -8.2, rank, num_outputs, range(rank)))
        if len(trained) > rank:
            parts.append((rank + 1.2, -8.2, len(trained), rank, range(len(trained))))
            axes.text(rank + 0.55, -8.9, "x", ha="center", **words)
            axes.text(rank + 1.2, -11.5, "mix (r, c)", **words)
        for left, top, width, height, filled in parts:
            for column, row in product(range(width), range(height)):
                colour = ours if column in filled else theirs
                axes.add_patch(Rectangle((left + column, top - row), 0.9, 0.9, color=colour))
        axes.text(-0.4, 2.85, "x", ha="right", **words)
        axes.text(-0.4, -1.9, "W'", ha="right", **words)
        axes.text(0, 4.1, f"{len(trained)} of {num_inputs} channels kept", **words)
        axes.text(0, -6.2, "trained:", **words)
        axes.text(rank + 1.2, -13, "delta (O, r)", **words)
        axes.text(0, 5.6, title, color=text, fontsize=9)
        axes.set(xlim=(-1.6, 17), ylim=(-14, 6.8), aspect="equal", anchor="W")
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
    right.set_title("bytes kept per token, layer and channel (counted)", fontsize=8)
    right.legend(frameon=False, fontsize=7)
    right.margins(x=0.15)
    _bare(right)


def _draw_first(figure: Any, text: str, ours: str, theirs: str) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, values) in zip(panels, first().items(), strict=True):
        _bars(axes, title, values, ours, theirs)
    figure.supxlabel(f"{read('lengths').provenance['how']}; lean level 1", fontsize=7)


def _draw_sync(figure: Any, text: str, ours: str, theirs: str) -> None:
    for number, (title, values) in enumerate(synced().items()):
        axes = figure.add_subplot(2, 2, number + 1)
        _bars(axes, title, values, ours, theirs)
        if title == _SENT:
            axes.set(xscale="log", xlim=(0.1, 1500), xticks=(0.1, 1, 10, 100))
            axes.set_xticklabels(["0.1", "1", "10", "100"], fontsize=7)
            axes.set_xlabel("logarithmic axis", fontsize=7)


def _draw_frontier(figure: Any, text: str, ours: str, theirs: str) -> None:
    rows = frontier()
    panels = figure.subplots(len(rows), 3, sharey="row", squeeze=False)
    figure.supylabel("test loss", fontsize=8)
    for line, (task, costs) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(task.replace(", ", "\n"), fontsize=8)
        for axes, (what, arms) in zip(line, costs.items(), strict=True):
            for name, (share, loss, half) in arms.items():
                colour = ours if is_paca(name) else theirs
                axes.plot([share] * 2, [loss - half, loss + half], color=colour, linewidth=1)
                axes.plot(share, loss, "o", color=colour, markersize=4)
            if what == "state":
                axes.set_xscale("log")
            axes.margins(x=0.4, y=0.1)
            axes.set_xlabel(_COSTS[what], fontsize=8)
            colours = {name: ours if is_paca(name) else text for name in arms}
            _name_points(axes, arms, colours)


def _name_points(
    axes: Any, points: Mapping[str, tuple[float, float, float]], colours: Mapping[str, str]
) -> None:
    """Write names in the margin that their points are nearer to, in the order of their losses."""
    shares = [share for share, _, _ in points.values()]
    middle = (min(shares) + max(shares)) / 2
    for side, place in (("left", 0.02), ("right", 0.98)):
        names = [n for n, (share, _, _) in points.items() if (share > middle) == (side == "right")]
        names.sort(key=lambda name: points[name][1])
        leader = {"arrowstyle": "-", "linewidth": 0.4, "relpos": (side == "left", 0.5)}
        for number, name in enumerate(names):
            axes.annotate(
                name,
                points[name][:2],
                xytext=(place, (number + 0.5) / len(names)),
                textcoords="axes fraction",
                ha=side,
                va="center",
                fontsize=7,
                color=colours[name],
                arrowprops=leader | {"color": colours[name]},
            )


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
        axes.set_xlabel("bytes of the file that were changed, %", fontsize=8)


def _bars(axes: Any, title: str, values: Mapping[str, float], ours: str, theirs: str) -> None:
    """Draw a bar for each value, ours first, with its number."""
    places = range(len(values))
    axes.barh(places, values.values(), color=[ours] + [theirs] * (len(values) - 1))
    for place, value in zip(places, values.values(), strict=True):
        axes.text(value, place, f" {value:.3g}", fontsize=8, va="center_baseline")
    axes.set_yticks(places, values, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.margins(x=0.25)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_ylim(sorted(axes.get_ylim(), reverse=True))  # once, where panels share it
    for spine in axes.spines.values():
        spine.set_visible(False)


_PICTURES = {
    "first": (_draw_first, 1.5),
    "method": (_draw_method, 3.0),
    "step": (_draw_step, 3.4),
    "sync": (_draw_sync, 2.8),
    "frontier": (_draw_frontier, 7.4),
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
