"""Tables of docs/quality.md and docs/lora.md about the study at equal cost, and about rates."""

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from textwrap import fill

from benchmarks.results import RESULTS, read
from benchmarks.verdict import (
    TASKS,
    compared,
    forgotten,
    is_paca,
    kept_in,
    stage_two,
    steps_of,
    studies,
    texts,
)
from benchmarks.verdict import two_of_paca as planned
from experiments.study.statistics import LOSS, Run, Study, best_rate, judged
from pacatune.files.folder import format_bytes
from pacatune.methods import METHODS
from pacatune.reports.rows import Table, spread_of_mean
from pacatune.training.config import default_rate
from pacatune.training.tasks import TASKS as TRAINING_TASKS

_DEFAULT, _LORAS = "paca16", ("lora16", "rslora16")
_STEPS = {"minilm": 120, "dinov2": 60, "smollm2-words": 40, "smollm2-sort": 40}
"""Steps of each task's runs."""


def block(name: str, results: Path = RESULTS) -> str:
    """Return the text of a block `found-NAME` of the docs."""
    table = _defaults() if name == "defaults" else _OF_STUDIES[name](studies(results))
    return table if isinstance(table, str) else "\n".join(table.markdown())


def _verdicts(tasks: dict[str, Study]) -> Table:
    """Return how two settings of PaCA differ in test loss from every rival, by task."""
    differences = {task: compared(study) for task, study in tasks.items()}
    pairs = [pair for found in differences.values() for pair in found]
    rivals = dict.fromkeys(rival for _, rival in pairs if not is_paca(rival))
    ours = {task: planned(study) for task, study in tasks.items()}
    cells = [["the other PaCA", *(f"`{arms[1]}`" for arms in ours.values())]]
    for place, title in enumerate(("`paca8`", "the other PaCA")):
        for rival in [*rivals, *(["the other PaCA"] if not place else [])]:
            line = [f"{title} minus {rival if ' ' in rival else f'`{rival}`'}"]
            for task, arms in ours.items():
                other = arms[1] if rival == "the other PaCA" else rival
                found = differences[task].get((arms[place], other))
                word = "" if found is None or found.said not in ("better", "worse") else found.said
                line.append(_text(found.mean, found.half_interval, word) if found else "-")
            cells.append(line)
    return Table(header=["", *map(_title, ours)], cells=cells)


def _default(tasks: dict[str, Study]) -> Table:
    """Return the default beside LoRA and beside other numbers of columns, by task."""
    others = ("lora16", "rslora16", "paca8", "paca64")
    cells = []
    for task, study in tasks.items():
        arms = stage_two(study)
        losses = {arm: [run[LOSS] for run in arms[arm].values()] for arm in (_DEFAULT, *others)}
        share = fmean(losses[_DEFAULT]) / fmean(losses["lora16"]) - 1
        line = [_title(task), f"{fmean(losses[_DEFAULT]):.3f}", f"{share:+.1%}".replace("%", " %")]
        line += [_difference(_paired(arms[_DEFAULT], arms[other])) for other in others]
        early = [_early(study[arm])[1] if arm in study else None for arm in (_DEFAULT, "lora8")]
        line.append("; ".join("-" if loss is None else f"{loss:.3f}" for loss in early))
        cells.append(line)
    header = ["", f"test loss of `{_DEFAULT}`", "mean beside `lora16`'s"]
    header += [f"minus `{other}`" for other in others]
    header += [f"validation loss, 2 seeds: `{_DEFAULT}`; `lora8`"]
    return Table(header=header, cells=cells)


def _reached(tasks: dict[str, Study]) -> Table:
    """Return the test loss and the score of every arm that ran to the end, by task."""
    lines: dict[str, dict[str, str]] = {}
    for task, study in tasks.items():
        for arm, by_seed in stage_two(study).items():
            runs = [*by_seed.values()]
            name = next(n for n in ("test accuracy", "test exact_match") if n in runs[0])
            losses, score = [run[LOSS] for run in runs], fmean(run[name] for run in runs)
            text = f"{fmean(losses):.3f} ± {spread_of_mean(losses):.3f}; {100 * score:.1f} %"
            lines.setdefault(arm, {})[task] = text
    cells = [[f"`{arm}`", *(line.get(task, "-") for task in tasks)] for arm, line in lines.items()]
    return Table(header=["arm", *map(_title, tasks)], cells=cells)


def _costs(tasks: dict[str, Study]) -> Table:
    """Return what every arm keeps and how long its step is, by task, and its state."""
    states = {r.method: r.value for r in read("cost-minilm").rows if r.what == "state"}
    arms = dict.fromkeys(arm for study in tasks.values() for arm in stage_two(study))
    cells = []
    for arm in arms:
        line = [f"`{arm}`"]
        for task, study in tasks.items():
            kept, steps = kept_in(task, study).get(arm), steps_of(task)
            size = "-" if kept is None else format_bytes(kept)
            is_there = arm in stage_two(study)
            line.append(f"{size}; {steps[arm] / steps['paca8']:.2f}" if is_there else "-")
        cells.append([*line, format_bytes(states[arm]) if arm in states else "-"])
    return Table(header=["arm", *map(_title, tasks), "state, LLaMA3-8B"], cells=cells)


def _forgotten(tasks: dict[str, Study]) -> str:
    """Return what settings of PaCA forget more than LoRA, and what all of it amounts to."""
    found: dict[tuple[str, str], list[float]] = {}
    titles = ("paca8", _DEFAULT, "the other PaCA")
    lines = []
    for task, study in tasks.items():
        for text, lora in product(texts(study), _LORAS):
            arms, line = stage_two(study), [_title(task), text, f"`{lora}`"]
            for ours in ("paca8", _DEFAULT, planned(study)[1]):
                points = forgotten(study, ours, lora, text, sorted(arms[ours]))
                by_seed = [mine - theirs for _, mine, theirs in points]
                found[f"{task}, {text}, {lora}", ours] = by_seed
                line.append(_difference(by_seed))
            lines.append(line)
    least = min(difference.p for difference in judged(found).values())
    shown = Table(header=["task", "text", "LoRA", *titles], cells=lines, num_index=3)
    less = sum(fmean(by_seed) < 0 for by_seed in found.values())
    said = (
        f"The mean is less in {less} of {len(found)} comparisons; **none is significant**: the "
        f"smallest p, corrected by Holm's method over all of them, is {least:.2f}."
    )
    return "\n".join([*shown.markdown(), "", fill(said, width=120)])


def _kept(tasks: dict[str, Study]) -> str:
    """Return how much more LoRA keeps of the same batch, by model."""
    shares = {}
    for task, study in tasks.items():
        kept = kept_in(task, study)
        shares.setdefault(TASKS[task].partition(",")[0], kept["lora16"] / kept[_DEFAULT])
    *parts, last = (f"{share:.2f} on {model}" for model, share in shares.items())
    factors = f"{', '.join(parts)} and {last}"
    return f"`lora16` keeps more bytes than `{_DEFAULT}`, by a factor of {factors}."


def _rates(tasks: dict[str, Study]) -> Table:
    """Return the best rate of each arm by task, and its mean validation loss with two seeds.

    Arms that are compared, and LoRA of rank 8; row groups left.
    """
    compared_arms = dict.fromkeys(arm for study in tasks.values() for arm in stage_two(study))
    arms = [a for a in (*compared_arms, "lora8") if not a.startswith(("pool", "spread"))]
    cells = []
    for arm in arms:
        best = [_early(study[arm]) if arm in study else None for study in tasks.values()]
        shown = ("-" if b is None else f"{_rate_text(b[0])}: {b[1]:.3f}" for b in best)
        cells.append([f"`{arm}`", *shown])
    return Table(header=["arm", *(f"{_title(t)}, {_STEPS[t]} steps" for t in tasks)], cells=cells)


def _defaults() -> Table:
    """Return the rates that `train` takes where none is given."""
    shown = ("paca", "lora", "full")
    cells = []
    for name, spec in TRAINING_TASKS.items():
        rates = [default_rate(spec, method) for method in shown]
        cells.append([f"`{name}`", *map(_rate_text, rates)])
    return Table(header=["`--task`", *(METHODS[m].title for m in shown)], cells=cells)


def _early(runs: Sequence[Run]) -> tuple[float, float]:
    """Return an arm's best rate, and its mean validation loss with the two seeds of all arms."""
    best = best_rate(runs)
    assert best is not None, "every arm has runs"
    at_best = [run for run in runs if run["learning rate"] == best and run["seed"] < 2]
    return best, fmean(run["validation loss"] for run in at_best)


def _paired(ours: dict[int, Run], theirs: dict[int, Run]) -> list[float]:
    return [ours[seed][LOSS] - theirs[seed][LOSS] for seed in sorted(ours.keys() & theirs.keys())]


def _rate_text(rate: float) -> str:
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _difference(by_seed: Sequence[float]) -> str:
    return _text(fmean(by_seed), spread_of_mean(by_seed))


def _text(mean: float, half: float, word: str = "") -> str:
    return f"{mean:+.3f} ± {half:.3f}" + (f", **{word}**" if word else "")


def _title(task: str) -> str:
    return TASKS[task].removesuffix("types of questions").rstrip(", ")


_OF_STUDIES = {
    "verdicts": _verdicts,
    "default": _default,
    "reached": _reached,
    "costs": _costs,
    "forgotten": _forgotten,
    "kept": _kept,
    "rates": _rates,
}
"""Name of a block -> what makes it of the studies."""


def names() -> Iterable[str]:
    """Return the names of all blocks."""
    return (*_OF_STUDIES, "defaults")
