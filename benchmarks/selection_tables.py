"""Tables of docs/selection_study.md, from the committed studies, and by its plan's rule who won."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import collect
from pacatune.reports.tables import table_lines
from pacatune.study.statistics import mean_of

STUDIES = (
    "minilm-r4",
    "minilm-r16",
    "efficientnet-r4",
    "efficientnet-r16",
    "smollm2-r8",
    "dinov2-r8",
)
REFERENCE, FOR_ORIENTATION = "random", "lora"
BETTER, WORSE, EQUAL = "better", "worse", "-"
# Hypothesis -> the arms it is about, and the arm they are compared with.
_BETTER_THAN = {
    "H1": (("gradient", "gradient-activation"), REFERENCE),
    "H2": (("activation", "weight-activation"), REFERENCE),
    "H3": (("activation-qr",), "activation"),
    "H4": (("budget",), REFERENCE),
}


def table(kind: str, results: Path) -> str:
    """Return one of the Markdown tables."""
    tables = {
        "differences": _differences,
        "verdicts": _verdicts,
        "rates": rates_lines,
        "forgetting": forgetting_lines,
    }
    if kind not in tables:
        raise ValueError(
            f"no table {kind!r} of the selection study; there are {', '.join(tables)}."
        )
    studies = read_studies(results)
    if not studies:
        return "None yet."
    return "\n".join(tables[kind](studies))


def read_studies(results: Path) -> dict[str, dict[str, Any]]:
    """Return study -> what its study.json held."""
    path = results / f"{collect.STUDIES}.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[f"selection-{name}"] for name in STUDIES if f"selection-{name}" in found}


def verdict(study: dict[str, Any], arm: str, reference: str = REFERENCE) -> str:
    """Return `better`, `worse` or `-`, by the rule of the plan.

    Better: the mean difference is better than 0 by more than the standard deviation of the study's
    reference over seeds, and it is better for every seed. Worse: the mean is worse by more than
    that.
    """
    sign = 1 if study["higher_is_better"] else -1
    spread = study["arms"][study.get("reference", REFERENCE)]["std"]
    differences = [sign * value for value in _paired(study, arm, reference)]
    mean = mean_of(differences)
    if mean is None or spread is None:
        return EQUAL
    if mean > spread and min(differences) > 0:
        return BETTER
    return WORSE if mean < -spread else EQUAL


def winners(studies: dict[str, dict[str, Any]]) -> list[str]:
    """Return the arms that `strategy: auto` could stand for, by the rule of the plan.

    That is: better than random in studies of two models at least, worse in none.
    """
    found = []
    for arm in _arms(studies):
        verdicts = {name: verdict(one, arm) for name, one in studies.items() if arm in one["arms"]}
        models = {name.partition("-")[0] for name, found in verdicts.items() if found == BETTER}
        if len(models) >= 2 and WORSE not in verdicts.values() and arm != FOR_ORIENTATION:
            found.append(arm)
    return found


def _arms(studies: dict[str, dict[str, Any]], reference: str = REFERENCE) -> list[str]:
    names = dict.fromkeys(name for study in studies.values() for name in study["arms"])
    return [name for name in names if name != reference]


def _paired(study: dict[str, Any], arm: str, reference: str) -> list[float]:
    ours, theirs = (study["arms"][name]["values"] for name in (arm, reference))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _lines(studies: dict[str, dict[str, Any]], first: str, rows: Iterable[list[str]]) -> list[str]:
    """Return a table with a column for each study."""
    return table_lines([first, *(f"`{name}`" for name in studies)], rows)


def _unit(study: dict[str, Any]) -> float:
    return 100 if study["metric"] == "accuracy" else 1


def _differences(studies: dict[str, dict[str, Any]]) -> list[str]:
    units = ["accuracy, %" if one["metric"] == "accuracy" else "loss" for one in studies.values()]
    randoms = [(study["arms"][REFERENCE], _unit(study)) for study in studies.values()]
    cells = [f"{arm['mean'] * unit:.4g} ± {arm['std'] * unit:.2g}" for arm, unit in randoms]
    rows = [["metric", *units], [f"`{REFERENCE}`", *cells]]
    rows += [
        [f"`{arm}`", *(_cell(study, arm) for study in studies.values())] for arm in _arms(studies)
    ]
    return _lines(studies, "", rows)


def _cell(study: dict[str, Any], arm: str) -> str:
    if arm not in study["arms"]:
        return ""
    found = study["arms"][arm]["comparison"]
    if found is None:
        return "failed"
    text = f"{found['mean'] * _unit(study):+.2g} (p {found['p_value']:.2g})"
    outcome = verdict(study, arm)
    return f"**{text}**" if outcome == BETTER else f"*{text}*" if outcome == WORSE else text


def _verdicts(studies: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{hypothesis}: `{arm}` against `{reference}`",
            *(verdict(study, arm, reference) for study in studies.values()),
        ]
        for hypothesis, (arms, reference) in _BETTER_THAN.items()
        for arm in arms
    ]
    shared = [
        verdict(study, "shared") if "shared" in study["arms"] else "" for study in studies.values()
    ]
    rows.append([f"H5: `shared` against `{REFERENCE}`", *shared])
    won = ", ".join(f"`{arm}`" for arm in winners(studies)) or "none"
    remark = f"Better than random in studies of two models at least and worse in none: {won}."
    return [*_lines(studies, "", rows), "", remark]


def rates_lines(studies: dict[str, dict[str, Any]], reference: str = REFERENCE) -> list[str]:
    """Return the table of the rates that were chosen."""
    rows = []
    for arm in (reference, *_arms(studies, reference)):
        cells = []
        for study in studies.values():
            one = study["arms"].get(arm)
            edge = " (edge)" if one and one["at_edge"] else ""
            cells.append(f"{one['learning_rate']:g}{edge}" if one else "")
        rows.append([f"`{arm}`", *cells])
    return _lines(studies, "chosen rate", rows)


def forgetting_lines(studies: dict[str, dict[str, Any]], reference: str = REFERENCE) -> list[str]:
    """Return the table of what was forgotten, where it was measured."""
    measured = {
        name: study
        for name, study in studies.items()
        if any(arm["forgetting"] is not None for arm in study["arms"].values())
    }
    if not measured:
        return ["None yet."]
    rows = [
        [f"`{arm}`", *(f"{study['arms'][arm]['forgetting']:+.4f}" for study in measured.values())]
        for arm in (reference, *_arms(measured, reference))
    ]
    return _lines(measured, "rise of the loss on general text", rows)
