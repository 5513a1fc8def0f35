"""What runs say: the rate of each arm, and differences by seed."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from scipy.stats import ttest_1samp

from pacatune.reports.rows import spread_of_mean

Run = Mapping[str, float]
"""What was measured -> value; the rate and the seed among it."""
Study = Mapping[str, Sequence[Run]]
"""Arm -> its runs."""
LOSS = "test loss"
LEVEL = 0.05
_NAMES = ("study", "arm", "key")


class Difference(NamedTuple):
    """How an arm differs from another one, by seed."""

    said: str
    """better, worse or no significant difference."""
    mean: float
    half_interval: float
    p: float
    """That of a paired t test, corrected for the number of pairs."""


def read_runs(path: Path) -> dict[str, dict[str, list[Run]]]:
    """Return the runs of a table by the names of its studies and arms."""
    studies: dict[str, dict[str, list[Run]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            run = {name: float(text) for name, text in row.items() if text and name not in _NAMES}
            studies.setdefault(row["study"], {}).setdefault(row["arm"], []).append(run)
    return studies


def write_runs(studies: Mapping[str, Mapping[tuple[str, float, int], Run]], path: Path) -> None:
    """Write a line for each run of studies, by arm, rate and seed, as `read_runs` reads them."""
    rows = [
        {"study": study, "arm": name, **run}
        for study, ended in studies.items()
        for (name, *_), run in sorted(ended.items())
    ]
    columns = dict.fromkeys(what for row in rows for what in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def validated(runs: Sequence[Run]) -> dict[float, float]:
    """Return the mean validation loss of an arm's rates, which chooses one.

    It is over the seeds that three rates have, or all; a rate that lacks one has failed.
    """
    rates: dict[float, dict[float, float]] = {}
    for run in runs:
        rates.setdefault(run["learning rate"], {})[run["seed"]] = run["validation loss"]
    counts = Counter(seed for losses in rates.values() for seed in losses)
    enough = min(3, max(counts.values(), default=0))
    common = {seed for seed, count in counts.items() if count >= enough}
    return {
        rate: fmean(losses[seed] for seed in common)
        for rate, losses in rates.items()
        if common <= losses.keys()
    }


def best_rate(runs: Sequence[Run]) -> float | None:
    """Return the rate with the least mean validation loss; None without any."""
    means = validated(runs)
    return min(means, key=lambda rate: means[rate]) if means else None


def chosen(runs: Sequence[Run]) -> dict[int, Run]:
    """Return an arm's runs at its best rate, by seed."""
    best = best_rate(runs)
    return {int(run["seed"]): run for run in runs if run["learning rate"] == best}


def rate_beyond(rate: float | None, rates: Sequence[float]) -> float | None:
    """Return the next rate outside of a rising grid whose best is at the edge, None elsewhere."""
    if rate is None or len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if rate == rates[0] else rates[-2]
    return float(f"{rate * rate / neighbour:.3g}")


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """Return p-values corrected for their number, by Holm's method."""
    corrected, largest = {}, 0.0
    for place, key in enumerate(sorted(values, key=lambda key: values[key])):
        corrected[key] = largest = max(largest, min(1.0, (len(values) - place) * values[key]))
    return corrected


def paired(ours: Mapping[int, Run], theirs: Mapping[int, Run], what: str = LOSS) -> list[float]:
    """Return ours minus theirs, for each seed that both have."""
    return [ours[seed][what] - theirs[seed][what] for seed in sorted(ours.keys() & theirs.keys())]


def compared(
    arms: Mapping[str, Mapping[int, Run]],
    pairs: Iterable[tuple[str, str]],
    what: str = LOSS,
    *,
    less_is_better: bool = True,
) -> dict[tuple[str, str], Difference]:
    """Return how pairs of arms differ; see `judged`."""
    differences = {(a, b): paired(arms[a], arms[b], what) for a, b in pairs}
    return judged(differences, less_is_better=less_is_better)


def judged(
    differences: Mapping[tuple[str, str], Sequence[float]], *, less_is_better: bool = True
) -> dict[tuple[str, str], Difference]:
    """Return what differences by seed say: paired t tests, corrected for the number of pairs.

    A pair of fewer than two seeds is left out.
    """
    several = {pair: by_seed for pair, by_seed in differences.items() if len(by_seed) > 1}
    # Of arms that are equal in every run it is not a number.
    values = {pair: float(ttest_1samp(d, 0.0).pvalue) for pair, d in several.items()}
    corrected = holm({pair: 1.0 if math.isnan(p) else p for pair, p in values.items()})
    results = {}
    for pair, by_seed in several.items():
        mean, said = fmean(by_seed), "no significant difference"
        if corrected[pair] < LEVEL:
            said = "better" if (mean < 0) == less_is_better else "worse"
        results[pair] = Difference(said, mean, spread_of_mean(by_seed), corrected[pair])
    return results
