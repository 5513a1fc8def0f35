"""Cells of studies: one arm each, what they hand on, and what their intervals are."""

import math

import pytest

from pacatune.experiments.reproduce import EXPERIMENTS, instruction
from pacatune.experiments.reproduce.runs import scores_of
from pacatune.experiments.reproduce.steps import RANK
from pacatune.experiments.study.result import ArmResult, StudyResult
from pacatune.paper import TABLES
from pacatune.paper.tables import Row


def arm_result(**changes):
    values = {
        "name": "paca",
        "method": "paca",
        "rank": 64,
        "learning_rate": 4e-3,
        "values": {0: 2.0, 1: 2.2},
        "mean": 2.1,
        "std": 0.1414,
        "num_trainable_parameters": 5,
        "forgetting": None,
        "rates": {2e-3: 2.5, 4e-3: 2.0, 8e-3: None},
        "at_edge": False,
        "comparison": None,
        "failures": [],
    }
    return ArmResult(**values | changes)


@pytest.fixture
def study(monkeypatch):
    """Stands in for run_study; `study.arm` is what it finds, `study.seen` what it was asked."""

    class Study:
        arm = arm_result()
        seen = ()

    def run_study(config, folder, console):
        Study.seen = (config, folder)
        return StudyResult(
            metric="loss",
            higher_is_better=False,
            reference="paca",
            arms={"paca": Study.arm},
            warnings=["at the edge"],
            config={},
            versions={},
        )

    monkeypatch.setattr("pacatune.experiments.study.run_study", run_study)
    return Study


def test_a_cell_runs_one_arm_in_its_own_folder(study, tmp_path):
    row = Row(model="llama3-8b", method="paca", rank=64, variant="gradient-2", values={})
    cell = instruction.small_cell(row)
    assert (cell.key, cell.methods) == ("small-llama3-8b-paca-r64-gradient-2", ("paca",))
    result = cell.run(tmp_path / "work" / "x", print)
    config, folder = study.seen
    (arm,) = config.arms.values()
    assert (arm.method, arm.rank, arm.selection) == ("paca", 64, "gradient")
    assert config.seeds == [2, 3]
    assert folder == tmp_path / "work" / "x"
    assert result["values"] == {"0": 2.0, "1": 2.2}
    assert result["rates"] == {"0.002": 2.5, "0.004": 2.0, "0.008": None}
    assert result["warnings"] == ["at the edge"]


def test_a_line_without_a_good_run_is_no_result(study, tmp_path):
    study.arm = arm_result(learning_rate=None, mean=None, std=None, failures=["rate 1: diverged"])
    cell = instruction.small_cell(TABLES["table2"].row("llama3-8b-paca-r64"))
    with pytest.raises(RuntimeError, match=r"no run of paca ended well: rate 1: diverged"):
        cell.run(tmp_path / "work", print)


def score_of(values, num_examples=None, **more):
    result = {"values": dict(enumerate(values)), "learning_rate": 4e-3, **more}
    return scores_of({"line": "cell"}, {"cell": result}, num_examples)["line"]


def test_intervals_are_two_standard_errors():
    loss = score_of([2.0, 2.2])
    std = 0.2 / math.sqrt(2)
    assert loss.value == 2.1
    assert loss.high - loss.value == pytest.approx(2 * std / math.sqrt(2))
    assert (loss.rate, loss.at_edge) == (0.004, False)
    accuracy = score_of([0.79, 0.81], 400)
    error = math.hypot(0.01, math.sqrt(0.8 * 0.2 / 400))
    assert accuracy.value == pytest.approx(80)
    assert accuracy.value - accuracy.low == pytest.approx(200 * error)
    edge = score_of([2.0], rates={"0.001": 2.4, "0.004": 2.1})
    assert (edge.rate, edge.at_edge) == (0.004, True)
    middle = score_of([2.0], rates={"0.001": 2.4, "0.004": 2.1, "0.008": None})
    assert (middle.rate, middle.at_edge) == (0.004, False)
    assert middle.low == middle.high


def test_two_seeds_that_happen_to_agree_are_not_sure():
    """They once made 3.065 [3.064, 3.065] worse than 3.032 [3.005, 3.059]: a contradiction."""
    seeds = {"close": (3.0645, 3.0655), "apart": (3.01, 3.05), "alone": (3.0,)}
    results = {
        key: {"values": dict(enumerate(values)), "learning_rate": 1e-3}
        for key, values in seeds.items()
    }
    scores = scores_of({key: key for key in [*seeds, "missing"]}, results)
    assert scores.keys() == seeds.keys()
    std = math.sqrt((0.001**2 + 0.04**2) / 2 / 2)
    for key, score in scores.items():
        assert score.high - score.value == pytest.approx(2 * std / math.sqrt(len(seeds[key])))
    assert scores["close"].low < scores["apart"].high


def test_strategies_and_methods_differ_in_nothing_else():
    """Equal settings but for the arm: what a fair comparison needs."""
    plain = [
        instruction.small_cell(Row(model="llama3-8b", method=method, rank=64, values={})).inputs
        for method in ("paca", "lora", "dora", "moslora", "qlora", "qpaca")
    ]
    for values in plain:
        (arm,) = values["arms"].values()
        assert tuple(arm["learning_rates"]) == instruction._RATES
        assert (arm["rank"], arm["alpha"], arm["options"]) == (64, None, {})
        assert values["options"].pop("paca", None) in (None, {"selection_batches": 8})
    assert len({str(values["options"]) for values in plain}) == 1
    assert len({str((v["task"], v["seeds"], v["validation_fraction"])) for v in plain}) == 1


def test_image_methods_share_all_but_the_method():
    cells = {cell.key: cell for cell in EXPERIMENTS["table6"].cells("small")}
    lora, paca = (cells[f"small-vit-b16-{m}"].inputs for m in ("lora", "paca"))
    arms = [next(iter(inputs["arms"].values())) for inputs in (lora, paca)]
    assert [arm["rank"] for arm in arms] == [RANK] * 2
    assert lora["options"] == paca["options"]
    assert lora["seeds"] == paca["seeds"]
