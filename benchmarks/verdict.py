"""Apply the rules of the study of row groups (studies/groups.md) to its results.

    python -m benchmarks.verdict                # reads results/groups.json

Prints for each study that is there which arms are better or worse than `paca` and than LoRA, and
which settings could become the default.
"""

import json
import sys
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from benchmarks.results import RESULTS
from pacatune.reports.rows import Table

Study = Mapping[str, Any]
MODELS = {
    "MiniLM-L6": ("groups-minilm",),
    "SmolLM2-135M": ("groups-smollm2", "groups-smollm2-words"),
    "DINOv2-S": ("groups-dinov2",),
}
"""Model -> its studies."""
LORAS = ("lora", "rslora")


def best_lora(study: Study) -> str:
    """Return the one with the better score on validation data."""
    sign = 1 if study["higher_is_better"] else -1
    best = {
        name: max(sign * value for value in study["arms"][name]["rates"].values() if value)
        for name in LORAS
    }
    return max(best, key=lambda name: best[name])


def judged(study: Study, arm: str, other: str) -> str:
    """Return whether an arm is better or worse than another one, or neither: the empty text."""
    sign = 1 if study["higher_is_better"] else -1
    ours, theirs = (study["arms"][name]["values"] for name in (arm, other))
    differences = [sign * (ours[seed] - theirs[seed]) for seed in ours]
    spread = study["arms"][study["reference"]]["std"]
    if fmean(differences) > spread and min(differences) > 0:
        return "better"
    return "worse" if fmean(differences) < -spread else ""


def on_model(studies: Mapping[str, Study], model: str, arm: str, other: str) -> str:
    """Return the same over the studies of a model: better on one, and worse on none."""
    found = set()
    for name in MODELS[model]:
        study = studies.get(name)
        if study is not None and arm in study["arms"]:
            found.add(judged(study, arm, best_lora(study) if other == "LoRA" else other))
    return "worse" if "worse" in found else "better" if "better" in found else ""


def candidates(studies: Mapping[str, Study]) -> list[str]:
    """Return the settings of PaCA that the rule would let be the default."""
    arms = {arm: one for study in studies.values() for arm, one in study["arms"].items()}
    found = []
    for arm, one in arms.items():
        said = {
            (model, other): on_model(studies, model, arm, other)
            for model in MODELS
            for other in ("paca", "LoRA")
        }
        both = [m for m in MODELS if said[m, "paca"] == said[m, "LoRA"] == "better"]
        if one["method"] == "paca" and len(both) >= 2 and "worse" not in said.values():
            found.append(arm)
    return found


def table(studies: Mapping[str, Study]) -> Table:
    """Return the verdicts of every arm and model."""
    arms = dict.fromkeys(arm for study in studies.values() for arm in study["arms"])
    header = [
        "method",
        *(f"{model}, than {other}" for model in MODELS for other in ("paca", "LoRA")),
    ]
    cells = [
        [
            arm,
            *(
                on_model(studies, model, arm, other)
                if any(arm in studies[name]["arms"] for name in MODELS[model] if name in studies)
                else "-"
                for model in MODELS
                for other in ("paca", "LoRA")
            ),
        ]
        for arm in arms
    ]
    return Table(header=header, cells=cells)


def main() -> None:
    """Print what the rules say."""
    studies = json.loads((RESULTS / "groups.json").read_text(encoding="utf-8"))
    studies = {name: study for name, study in studies.items() if "rate" not in name}
    print("\n".join(table(studies).markdown()))
    print(f"\nMay become the default: {', '.join(candidates(studies)) or 'none'}.")


if __name__ == "__main__":
    sys.exit(main())
