"""Rows of the committed studies, and the tables of their documents."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pacatune.reports.rows import Row, spread_of_mean, table

FILES = ("quality", "selection")
"""Studies of one name are kept in `results/NAME.json`; folders of their parts begin with it."""
_UNITS = {"accuracy": (100.0, "%"), "exact_match": (100.0, "%"), "loss": (1.0, "")}


def rows_of(model: str, study: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what a study found of each arm, on test data at its best rate."""
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
        edge = "at the edge of its grid" * arm["at_edge"]
        yield Row(
            what="rate", value=arm["learning_rate"], note=edge and f"{name}: {edge}.", **names
        )
        yield Row(what="trained parameters", value=arm["num_trainable_parameters"], **names)
        if arm["forgetting"] is not None:
            yield Row(what="forgetting", value=arm["forgetting"], **names)
        if arm.get("saved_activation_bytes") is not None:
            kept = arm["saved_activation_bytes"]
            yield Row(what="kept for backward", value=kept, unit="bytes", **names)
        for rate, value in arm["rates"].items():
            if value is not None:
                at = f"{float(rate):g}"
                yield Row(what="validation", value=factor * value, unit=unit, setting=at, **names)


def differences(rows: Iterable[Row], references: Mapping[str, str]) -> Iterator[Row]:
    """Yield each arm's score minus that of its study's reference, seed by seed."""
    scores = [row for row in rows if row.what.startswith("test ")]
    known = {(row.model, row.method): row for row in scores}
    for row in scores:
        other = known[row.model, references[row.model]]
        if row is not other:
            yield replace(row.minus(other), method=row.method)


def block(kind: str, what: str, results: Path) -> str:
    """Return a table of one of `FILES`: scores, differences, rates, forgetting, bytes, transfer."""
    path = results / f"{kind}.json"
    studies = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    studies = {name.removeprefix(f"{kind}-"): study for name, study in studies.items()}
    transfer = {name: study for name, study in studies.items() if name == "transfer"}
    chosen = (
        transfer if what == "transfer" else {n: s for n, s in studies.items() if n not in transfer}
    )
    rows = [row for name, study in chosen.items() for row in rows_of(name, study)]
    if not rows:
        return "None yet."
    columns = ("setting",) if what == "transfer" else ("model", "what")
    if what == "differences":
        rows = list(differences(rows, {name: study["reference"] for name, study in chosen.items()}))
    picked = {
        "scores": lambda row: row.what.startswith("test "),
        "differences": lambda row: True,
        "rates": lambda row: row.what == "rate",
        "forgetting": lambda row: row.what == "forgetting",
        "bytes": lambda row: row.what in ("trained parameters", "kept for backward"),
        "transfer": lambda row: row.what == "validation",
    }
    if what not in picked:
        raise ValueError(f"no table {what!r} of the study {kind}; there are {', '.join(picked)}.")
    shown = [row for row in rows if picked[what](row)]
    if what == "transfer":  # columns in the order of the rates, which differ by arm
        shown.sort(key=lambda row: float(row.setting))
    return "\n".join(table(shown, ("method",), columns).markdown())
