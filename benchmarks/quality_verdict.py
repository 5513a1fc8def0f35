"""What the quality study decides, by the rule of its plan (docs/quality_study.md).

    python -m benchmarks.quality_verdict FOLDER...

FOLDER is what `pacatune compare` wrote for one of benchmarks/studies/quality-*.yaml, finished or
not.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.selection_tables import BETTER, EQUAL, WORSE, verdict
from pacatune.reports.tables import table_lines

REFERENCE = "paca"
LORAS = ("lora", "rslora")
"""LoRA at two scales; each model's baseline is the one that is better on validation data."""
FOR_ORIENTATION = ("dora", "full", *LORAS)
_NEEDED_MODELS = 2

Study = Mapping[str, Any]


def baseline(study: Study) -> str | None:
    """Return which LoRA a model's arms are compared with; None while neither has a result."""
    sign = 1 if study["higher_is_better"] else -1
    best = {
        name: max(sign * value for value in values)
        for name in LORAS
        if (values := _validation(study, name))
    }
    return max(best, key=lambda name: best[name]) if best else None


def _validation(study: Study, name: str) -> list[float]:
    rates = study["arms"].get(name, {}).get("rates", {})
    return [value for value in rates.values() if value is not None]


def candidates(studies: Mapping[str, Study]) -> list[str]:
    """Return the variants of PaCA that the studies have."""
    names = dict.fromkeys(name for study in studies.values() for name in study["arms"])
    return [name for name in names if name not in (REFERENCE, *FOR_ORIENTATION)]


def outcomes(studies: Mapping[str, Study], arm: str) -> dict[str, tuple[str, str]]:
    """Return model -> how an arm does against random PaCA and against LoRA."""
    found = {}
    for name, study in studies.items():
        lora = baseline(study)
        if arm in study["arms"] and lora is not None:
            against_paca = EQUAL if arm == REFERENCE else verdict(dict(study), arm, REFERENCE)
            found[name] = (against_paca, verdict(dict(study), arm, lora))
    return found


def winners(studies: Mapping[str, Study]) -> list[str]:
    """Return the variants that beat both on two models at least and lose to neither on any."""
    found = []
    for arm in candidates(studies):
        all_of = outcomes(studies, arm)
        models = [name for name, pair in all_of.items() if pair == (BETTER, BETTER)]
        if len(models) >= _NEEDED_MODELS and not any(WORSE in pair for pair in all_of.values()):
            found.append(arm)
    return found


def report(studies: Mapping[str, Study]) -> list[str]:
    """Return the verdicts as a table, and what they decide."""
    rows = [
        [f"`{arm}`", *(" / ".join(found.get(name, ("", ""))).strip(" /") for name in studies)]
        for arm in (REFERENCE, *candidates(studies))
        for found in [outcomes(studies, arm)]
    ]
    loras = [f"`{baseline(study)}`" for study in studies.values()]
    won = ", ".join(f"`{arm}`" for arm in winners(studies)) or "none"
    return [
        *table_lines(
            ["against random PaCA / against LoRA", *(f"`{name}`" for name in studies)],
            [["LoRA is", *loras], *rows],
        ),
        "",
        f"Better than both on {_NEEDED_MODELS} models at least and worse on none: {won}.",
    ]


def main(argv: list[str] | None = None) -> None:
    """Read the command line and print the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    folders: list[Path] = parser.parse_args(argv).folders
    studies = {
        folder.name.removeprefix("quality-"): json.loads((folder / "study.json").read_text())
        for folder in folders
    }
    print("\n".join(report(studies)))
    unfinished = [name for name, study in studies.items() if not study["finished"]]
    if unfinished:
        print(f"\nUnfinished: {', '.join(unfinished)}; nothing is decided yet.")


if __name__ == "__main__":
    sys.exit(main())
