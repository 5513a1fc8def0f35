"""The tables of the selection study, and the rule of its plan."""

import json

import pytest

from benchmarks.selection_tables import read_studies, table, verdict, winners
from pacatune.study.statistics import compare, mean_of, std_of


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
                "learning_rate": 2e-3,
                "at_edge": name == "gradient",
                "forgetting": 0.125 if metric == "loss" else None,
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


GOOD, BAD, LIKE = [0.90, 0.92], [0.70, 0.72], RANDOM


@pytest.mark.parametrize(
    ("by_study", "expected"),
    [
        ({"minilm-r4": GOOD, "dinov2-r8": GOOD, "smollm2-r8": LIKE}, ["gradient"]),
        ({"minilm-r4": GOOD, "minilm-r16": GOOD}, []),  # one model
        ({"minilm-r4": GOOD, "dinov2-r8": GOOD, "smollm2-r8": BAD}, []),
    ],
)
def test_who_wins(by_study, expected):
    studies = {
        name: study({"random": RANDOM, "gradient": values, "lora": GOOD})
        for name, values in by_study.items()
    }
    assert winners(studies) == expected


@pytest.fixture
def results(tmp_path):
    arms = {
        "random": RANDOM,
        "gradient": GOOD,
        "gradient-activation": BAD,
        "activation": LIKE,
        "weight-activation": LIKE,
        "activation-qr": GOOD,
        "budget": LIKE,
    }
    losses = {name: [1 - value for value in values] for name, values in arms.items()}
    studies = {
        "selection-smollm2-r8": study(losses | {"shared": [0.2, 0.18]}, "loss"),
        "selection-efficientnet-r4": study(arms),
    }
    (tmp_path / "selection.json").write_text(json.dumps(studies))
    return tmp_path


def test_tables(results):
    assert list(read_studies(results)) == ["efficientnet-r4", "smollm2-r8"]
    differences = table("differences", results).splitlines()
    assert differences[0] == "| | `efficientnet-r4` | `smollm2-r8` |"
    assert differences[3] == "| `random` | 81 ± 1.4 | 0.19 ± 0.014 |"
    assert differences[4] == "| `gradient` | **+10 (p 0.5)** | **-0.1 (p 0.5)** |"
    assert differences[5] == "| `gradient-activation` | *-10 (p 0.5)* | *+0.1 (p 0.5)* |"
    verdicts = table("verdicts", results)
    assert "| H3: `activation-qr` against `activation` | better | better |" in verdicts
    assert "| H5: `shared` against `random` |  | - |" in verdicts
    assert verdicts.endswith("worse in none: `gradient`, `activation-qr`.")
    assert "| `gradient` | 0.002 (edge) | 0.002 (edge) |" in table("rates", results)
    forgetting = table("forgetting", results)
    assert "efficientnet" not in forgetting
    assert "| `random` | +0.1250 |" in forgetting


def test_before_any_run_and_unknown_tables(tmp_path):
    assert table("verdicts", tmp_path) == "None yet."
    with pytest.raises(ValueError, match=r"no table 'rate'.*there are differences, verdicts"):
        table("rate", tmp_path)
