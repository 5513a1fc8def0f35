"""Tables of docs/quality_study.md, from the committed studies, and by its plan's rule who won."""

import json
from pathlib import Path
from typing import Any

from benchmarks import collect, quality_verdict
from benchmarks.selection_tables import BETTER, WORSE, forgetting_lines, rates_lines, verdict
from pacatune.reports.tables import table_lines

MODELS = ("smollm2", "minilm", "dinov2", "efficientnet")
TRANSFER = "transfer"

Studies = dict[str, dict[str, Any]]


def table(kind: str, results: Path) -> str:
    """Return one of the Markdown tables."""
    tables = {
        "scores": _scores,
        "verdicts": quality_verdict.report,
        "rates": lambda studies: rates_lines(studies, quality_verdict.REFERENCE),
        "forgetting": lambda studies: forgetting_lines(studies, quality_verdict.REFERENCE),
        "bytes": _bytes,
    }
    if kind not in (*tables, TRANSFER):
        known = ", ".join((*tables, TRANSFER))
        raise ValueError(f"no table {kind!r} of the quality study; there are {known}.")
    studies = read_studies(results)
    if kind == TRANSFER:
        return "\n".join(_transfer(studies[TRANSFER])) if TRANSFER in studies else "None yet."
    models = {name: studies[name] for name in MODELS if name in studies}
    return "\n".join(tables[kind](models)) if models else "None yet."


def read_studies(results: Path) -> Studies:
    """Return model -> what its study.json held, and the transfer of rates."""
    path = results / f"{collect.QUALITY}.json"
    if not path.is_file():
        return {}
    found: Studies = json.loads(path.read_text(encoding="utf-8"))
    return {name.removeprefix(f"{collect.QUALITY}-"): study for name, study in found.items()}


def _scores(studies: Studies) -> list[str]:
    """A line per arm: mean and standard deviation of the test score in %."""
    arms = dict.fromkeys(name for study in studies.values() for name in study["arms"])
    rows = [["score", *(study["metric"] for study in studies.values())]]
    rows += [[f"`{arm}`", *(_score(study, arm) for study in studies.values())] for arm in arms]
    return table_lines(["", *(f"`{name}`" for name in studies)], rows)


def _score(study: dict[str, Any], arm: str) -> str:
    """Bold where an arm is better than random PaCA by the rule, italic where worse."""
    if arm not in study["arms"]:
        return ""
    found = study["arms"][arm]
    if found["mean"] is None:
        return "failed"
    text = f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"
    outcome = verdict(study, arm, quality_verdict.REFERENCE)
    return f"**{text}**" if outcome == BETTER else f"*{text}*" if outcome == WORSE else text


def _bytes(studies: Studies) -> list[str]:
    """A line per arm: trained parameters, and bytes kept for backward by a step's median."""
    arms = dict.fromkeys(name for study in studies.values() for name in study["arms"])
    rows = [[f"`{arm}`", *(_size(study, arm) for study in studies.values())] for arm in arms]
    titles = (f"`{name}`: parameters, MB" for name in studies)
    return table_lines(["trained, and kept for backward", *titles], rows)


def _size(study: dict[str, Any], arm: str) -> str:
    found = study["arms"].get(arm)
    if found is None or found["saved_activation_bytes"] is None:
        return ""
    kept = found["saved_activation_bytes"] / 1e6
    return f"{found['num_trainable_parameters']:,}, {kept:,.1f}"


def _transfer(study: dict[str, Any]) -> list[str]:
    """A line per arm: validation score in % at each rate, the best one bold."""
    rates = sorted({float(rate) for arm in study["arms"].values() for rate in arm["rates"]})
    rows = []
    for name, arm in study["arms"].items():
        found = {float(rate): value for rate, value in arm["rates"].items()}
        cells = ["" if (one := found.get(rate)) is None else f"{100 * one:.1f}" for rate in rates]
        best = rates.index(arm["learning_rate"])
        cells[best] = f"**{cells[best]}**"
        rows.append([f"`{name}`", *cells])
    return table_lines(["rate", *(f"{rate:g}" for rate in rates)], rows)
