"""Tables of docs/quality_study.md, from the committed studies, and by its plan's rule who won."""

import json
from pathlib import Path
from typing import Any

from benchmarks import collect, quality_verdict
from benchmarks.selection_tables import BETTER, WORSE, verdict
from pacatune.reports.tables import table_lines

MODELS = ("smollm2", "minilm", "dinov2", "efficientnet")
TRANSFER = "transfer"

Studies = dict[str, dict[str, Any]]


def table(kind: str, results: Path) -> str:
    """Return one of the Markdown tables."""
    studies = read_studies(results)
    if not studies:
        return "None yet."
    if kind == TRANSFER:
        return "\n".join(_transfer(studies[TRANSFER]))
    models = {name: studies[name] for name in MODELS if name in studies}
    return "\n".join({"scores": _scores, "forgetting": _forgetting}[kind](models))


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


def _forgetting(studies: Studies) -> list[str]:
    """A line per arm: the rise of the loss on general text, where it was measured."""
    text = studies["smollm2"]["arms"]
    rows = [[f"`{name}`", f"{arm['forgetting']:+.4f}"] for name, arm in text.items()]
    return table_lines(["rise of the loss on general text", "`smollm2`"], rows)


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
