"""Runs of cells: done once, gone on with, in this process, and clear when one fails."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest

from pacatune.evaluation.harness import Score
from pacatune.experiments.reproduce import EXPERIMENTS, instruction, mmlu
from pacatune.experiments.reproduce.runs import Runs, scores_of, text_run
from pacatune.experiments.reproduce.steps import RANK
from pacatune.paper import TABLES
from pacatune.paper.tables import Row
from pacatune.study.result import ArmResult, StudyResult

ROW = TABLES["table1"].row("llama3-8b-paca-r8")


def tell(line):
    pass


def make_run(**changes):
    stated = mmlu.small_stated(ROW)
    options = {"model": "m", "data": {"path": "d.jsonl"}, "rate": 1e-3, "dtype": "float32"}
    return text_run(stated, "paca", **options | changes)


def write_report(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("before", "resumes"), [((), False), (("checkpoint-2",), True)])
def test_training_goes_on_where_it_was_stopped(before, resumes, tmp_path, monkeypatch):
    output, seen = tmp_path / "run", []

    def train(run, *, resume, overwrite, console):
        seen.append((run.training.output_dir, resume, overwrite))
        print("a bar")
        console.print("a table")
        write_report(output, {"loss": 1.0})

    monkeypatch.setattr("pacatune.training.recipe.train", train)
    for name in before:
        (output / name).mkdir(parents=True)
    found = Runs(folder=tmp_path, tell=tell)
    assert found.train(make_run(), "run") == ({"loss": 1.0}, output)
    assert seen == [(str(output), resumes, not resumes)]
    assert (tmp_path / "run.log").read_text() == "a bar\na table\n"
    found.train(make_run(), "run")
    assert len(seen) == 1


def test_what_is_computed_is_kept(tmp_path):
    calls = []

    def compute():
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("no more memory")
        return {"accuracy": 7}

    found = Runs(folder=tmp_path, tell=tell)
    with pytest.raises(RuntimeError, match="no more memory"):
        found.once("score", compute)
    for _ in range(2):
        assert found.once("score", compute) == {"accuracy": 7}
    assert len(calls) == 2


def test_the_best_rate_is_judged(tmp_path, monkeypatch):
    """Table 3 at the full scale, but for training and the judge."""
    cells = {cell.key: cell for cell in EXPERIMENTS["table3"].cells("full")}
    losses = {5e-4: 2.0, 1e-3: 1.0, 5e-3: 3.0}
    seen = []

    def train(self, run, name):
        rate = run.training.learning_rate
        report = {"eval_loss_after": losses[rate], "step_ms": 2.0, "num_steps": 10}
        more = {"peak_memory_bytes": 1, "num_trainable_parameters": 5}
        return report | more, tmp_path / name

    def judge(config, console, log):
        seen.append(config)
        line = {"name": "all", "mean": 5.0, "low": 4.0, "high": 6.0}
        math = {"name": "math", "mean": 3.0, "low": None, "high": None}
        return {"table": [line, math, {"name": "coding", "mean": None, "low": None, "high": None}]}

    monkeypatch.setattr(Runs, "train", train)
    monkeypatch.setattr("pacatune.evaluation.mt_bench.run_mt_bench", judge)
    result = cells["full-llama3-8b-qpaca-r64"].run(tmp_path, tell)
    assert result == {
        "scores": {
            "average": {"value": 5.0, "low": 4.0, "high": 6.0},
            "math": {"value": 3.0, "low": 3.0, "high": 3.0},
        },
        "learning_rate": 1e-3,
        "rates": {"0.0005": 2.0, "0.001": 1.0, "0.005": 3.0},
        "peak_memory_bytes": 1,
        "training_ms": 20.0,
        "num_trainable_parameters": 5,
    }
    (config,) = seen
    assert config.adapter == str(tmp_path / "rate-0.001")
    assert (config.judge_model, config.output) == ("gpt-4o-mini", tmp_path / "mt-bench")


def test_a_line_with_one_rate_needs_no_validation_data(tmp_path, monkeypatch):
    """Table 1 at the full scale, but for training and MMLU."""
    score = Score(value=0.5, stderr=0.01, num_questions=4)
    result = SimpleNamespace(categories={"STEM": score}, average=score)
    report = {"eval_loss_after": None, "step_ms": 2.0, "num_steps": 10}
    report |= {"peak_memory_bytes": 1, "num_trainable_parameters": 5}
    monkeypatch.setattr(Runs, "train", lambda self, run, name: (report, tmp_path / name))
    seen = []

    @contextlib.contextmanager
    def loaded(model, adapter):
        seen.append((model, adapter))
        yield SimpleNamespace(model=None, tokenizer=None)

    monkeypatch.setattr(mmlu, "loaded", loaded)
    monkeypatch.setattr("pacatune.evaluation.evaluate_mmlu", lambda *args, **options: result)
    cells = {cell.key: cell for cell in EXPERIMENTS["table1"].cells("full")}
    found = cells[f"full-{ROW.key}"].run(tmp_path, tell)
    assert seen == [("meta-llama/Meta-Llama-3-8B", tmp_path / "run")]
    assert found["scores"]["average"]["value"] == 0.5
    assert (found["training_ms"], "rates" in found) == (20.0, False)


@pytest.fixture
def tiny_questions(tmp_path, tiny_model_dir, monkeypatch):
    """Table 1's small runs, of one step on a tiny model and eight questions."""
    rows = [
        {
            "prompt": f"Is {n} even? A:",
            "completion": f" {'yes' if n % 2 == 0 else 'no'}",
            "question": f"Is {n} even?",
            "choices": ["yes", "no"],
            "answer": n % 2,
        }
        for n in range(60)
    ]
    folder = tmp_path / "type-choices"
    folder.mkdir()
    for name, part in (("train", rows[:50]), ("test", rows[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "smollm2-135m-instruct-q4_1").symlink_to(tiny_model_dir)
    monkeypatch.setattr(mmlu, "PACKAGED", str(tmp_path))
    monkeypatch.setattr(mmlu, "_STEPS", 1)
    monkeypatch.setattr(mmlu, "_RATES", (1e-3, 1e-1))
    monkeypatch.setattr(mmlu, "_NUM_QUESTIONS", 8)


def test_a_small_line_of_table_1_is_trained_and_scored(tiny_questions, tmp_path, monkeypatch):
    cell = mmlu.small_cell(ROW)
    lines = []
    result = cell.run(tmp_path / "work", lines.append)
    assert set(result["values"]) == {"0", "1"}
    assert all(0 <= value <= 1 for value in result["values"].values())
    assert f"{result['learning_rate']}" == min(result["rates"], key=result["rates"].get)
    assert sum("  training rate" in line for line in lines) == 3  # two rates, one more seed
    assert sum("  score-seed" in line for line in lines) == 2
    assert result["num_trainable_parameters"] > 0
    # Killed and called again, it does nothing twice.
    monkeypatch.setattr("pacatune.training.recipe.train", pytest.fail)
    monkeypatch.setattr(mmlu, "_ask_small", pytest.fail)
    assert cell.run(tmp_path / "work", lines.append) == result


def test_what_is_packaged_must_be_prepared(tiny_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(mmlu, "PACKAGED", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"`python -m examples\.packaged smollm2 type"):
        mmlu.small_cell(ROW).run(tmp_path / "work", tell)


def test_a_model_without_training_is_scored(tiny_questions, tmp_path):
    cell = mmlu.small_cell(TABLES["table1"].row("llama3-8b-none"))
    result = cell.run(tmp_path / "work", tell)
    assert list(result["values"]) == ["0"]
    assert result["learning_rate"] is None


# Cells of studies: one arm each, what they hand on, and what their intervals are.


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

    monkeypatch.setattr("pacatune.study.run_study", run_study)
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
