"""Rows of the committed studies, and the tables of their documents."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pacatune.reports.rows import Row, spread_of_mean, table

KIND = "groups"
"""Name of the studies that are kept in `results/NAME.json`."""
_UNITS = {"accuracy": (100.0, "%"), "exact_match": (100.0, "%"), "loss": (1.0, "")}


def rows_of(model: str, study: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what a study found of each arm: its score, what it forgot and keeps, its rate."""
    factor, unit = _UNITS[study["metric"]]
    for name, arm in study["arms"].items():
        if arm["mean"] is None:
            continue
        names: dict[str, Any] = {"method": name, "model": model, "n": len(arm["values"])}
        each = {seed: factor * value for seed, value in arm["values"].items()}
        mean, ends = factor * arm["mean"], dict[str, float]()
        if len(each) > 1:  # of one run nothing is known of the spread
            spread = spread_of_mean([*each.values()])
            ends = {"low": mean - spread, "high": mean + spread}
        score = f"test {study['metric'].replace('_', ' ')}"
        yield Row(what=score, value=mean, unit=unit, each=each, **ends, **names)
        if arm["forgetting"] is not None:
            yield Row(what="forgetting", value=arm["forgetting"], **names)
        if arm.get("saved_activation_bytes") is not None:
            kept = arm["saved_activation_bytes"]
            yield Row(what="kept for backward", value=kept, unit="bytes", **names)
        yield Row(what="best rate", value=arm["learning_rate"], **names)


def block(what: str, results: Path) -> str:
    """Return a table of them: scores, costs, rates."""
    known = json.loads((results / f"{KIND}.json").read_text(encoding="utf-8"))
    named = {name.removeprefix(f"{KIND}-"): study for name, study in known.items()}
    chosen = {name: study for name, study in named.items() if not name.startswith("rate")}
    rows = [row for name, study in chosen.items() for row in rows_of(name, study)]
    # Options that left with this study, see studies/groups.md.
    rows = [row for row in rows if "normalized" not in row.method]
    quantities: dict[str, Any] = {"scores": "test", "costs": ("kept", "forgetting")}
    quantities["rates"] = "best rate"
    if what not in quantities:
        raise ValueError(
            f"no table {what!r} of the study {KIND}; there are {', '.join(quantities)}."
        )
    rows = [row for row in rows if row.what.startswith(quantities[what])]
    return "\n".join(table(rows, ("method",), ("model", "what")).markdown())
