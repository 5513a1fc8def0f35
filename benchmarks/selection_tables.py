"""The table of docs/selection_study.md, from the committed studies, and the rule of its plan."""

import json
from pathlib import Path
from typing import Any

from benchmarks import collect
from pacatune.experiments.study.statistics import mean_of
from pacatune.reports.tables import table_lines

STUDIES = (
    "minilm-r4",
    "minilm-r16",
    "efficientnet-r4",
    "efficientnet-r16",
    "smollm2-r8",
    "dinov2-r8",
)
REFERENCE = "random"
BETTER, WORSE, EQUAL = "better", "worse", "-"


def table(results: Path) -> str:
    """Return a line per arm: its mean difference to random columns, as Markdown."""
    path = results / f"{collect.STUDIES}.json"
    if not path.is_file():
        return "None yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    studies = {name: found[f"selection-{name}"] for name in STUDIES if f"selection-{name}" in found}
    units = ["accuracy, %" if one["metric"] == "accuracy" else "loss" for one in studies.values()]
    randoms = [(study["arms"][REFERENCE], _unit(study)) for study in studies.values()]
    cells = [f"{arm['mean'] * unit:.4g} ± {arm['std'] * unit:.2g}" for arm, unit in randoms]
    rows = [["metric", *units], [f"`{REFERENCE}`", *cells]]
    arms = dict.fromkeys(name for study in studies.values() for name in study["arms"])
    del arms[REFERENCE]
    rows += [[f"`{arm}`", *(_cell(study, arm) for study in studies.values())] for arm in arms]
    return "\n".join(table_lines(["", *(f"`{name}`" for name in studies)], rows))


def verdict(study: dict[str, Any], arm: str, reference: str = REFERENCE) -> str:
    """Return `better`, `worse` or `-`, by the rule of the plan.

    Better: the mean difference is better than 0 by more than the standard deviation of the study's
    reference over seeds, and it is better for every seed. Worse: the mean is worse by more than
    that.
    """
    sign = 1 if study["higher_is_better"] else -1
    spread = study["arms"][study.get("reference", REFERENCE)]["std"]
    ours, theirs = (study["arms"][name]["values"] for name in (arm, reference))
    differences = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    mean = mean_of(differences)
    if mean is None or spread is None:
        return EQUAL
    if mean > spread and min(differences) > 0:
        return BETTER
    return WORSE if mean < -spread else EQUAL


def _unit(study: dict[str, Any]) -> float:
    return 100 if study["metric"] == "accuracy" else 1


def _cell(study: dict[str, Any], arm: str) -> str:
    if arm not in study["arms"]:
        return ""
    found = study["arms"][arm]["comparison"]
    if found is None:
        return "failed"
    text = f"{found['mean'] * _unit(study):+.2g} (p {found['p_value']:.2g})"
    outcome = verdict(study, arm)
    return f"**{text}**" if outcome == BETTER else f"*{text}*" if outcome == WORSE else text
