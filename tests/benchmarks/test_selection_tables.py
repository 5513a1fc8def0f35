"""The table of the selection study, and the rule of its plan."""

import json

import pytest

from benchmarks.selection_tables import table, verdict
from pacatune.experiments.study.statistics import compare, mean_of, std_of


def study(arms, metric="accuracy"):
    """What study.json holds; arms: name -> a value for each seed."""
    values = {name: dict(enumerate(numbers)) for name, numbers in arms.items()}
    return {
        "finished": True,
        "metric": metric,
        "higher_is_better": metric == "accuracy",
        "arms": {
            name: {
                "values": {str(seed): value for seed, value in by_seed.items()},
                "mean": mean_of(list(by_seed.values())),
                "std": std_of(list(by_seed.values())),
                "comparison": None
                if name == "random"
                else vars(compare(by_seed, values["random"])),
            }
            for name, by_seed in values.items()
        },
    }


RANDOM = [0.80, 0.82]  # spread 0.014


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.82, 0.84], "better"),
        ([0.81, 0.83], "-"),  # by less than the spread
        ([0.90, 0.81], "-"),  # not for every seed
        ([0.78, 0.80], "worse"),
        ([0.70, 0.83], "worse"),
        ([0.80, 0.82], "-"),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_rule(values, expected, metric):
    sign = 1 if metric == "accuracy" else -1
    arms = {"random": RANDOM, "gradient": values}
    one = study({name: [sign * v for v in numbers] for name, numbers in arms.items()}, metric)
    assert verdict(one, "gradient") == expected


def test_table(tmp_path):
    assert table(tmp_path) == "None yet."
    arms = {"random": RANDOM, "gradient": [0.90, 0.92], "activation": [0.70, 0.72]}
    losses = {name: [1 - value for value in values] for name, values in arms.items()}
    studies = {
        "selection-smollm2-r8": study(losses | {"shared": [0.2, 0.18]}, "loss"),
        "selection-efficientnet-r4": study(arms),
    }
    (tmp_path / "selection.json").write_text(json.dumps(studies))
    assert table(tmp_path).splitlines()[3:] == [
        "| `random` | 81 ± 1.4 | 0.19 ± 0.014 |",
        "| `gradient` | **+10 (p 0.5)** | **-0.1 (p 0.5)** |",
        "| `activation` | *-10 (p 0.5)* | *+0.1 (p 0.5)* |",
        "| `shared` |  | +0 (p 1) |",
    ]
