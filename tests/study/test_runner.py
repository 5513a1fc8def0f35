"""What is run when, what is kept, and what comes out of it; results are scripted."""

import json
import signal
from dataclasses import replace

import pytest

from benchmarks import collect
from pacatune.study import Arm, StudyConfig, StudyPaused, runner
from pacatune.study.plan import make_plan
from pacatune.study.report import table
from pacatune.study.runner import pending_runs
from pacatune.study.tasks import StudyTask
from pacatune.training.language import LanguageTrainer
from tests.study.conftest import run

ARMS = {
    "paca": Arm(rank=4, learning_rates=[5e-4, 1e-3, 4e-3]),
    "lora": Arm(method="lora", learning_rates=[1e-3, 4e-3]),
}
# Rates with the first seed, arms in turns.
RATES = [("paca", 5e-4), ("lora", 1e-3), ("paca", 1e-3), ("lora", 4e-3), ("paca", 4e-3)]
TUNING = [(*pair, 0) for pair in RATES]


def config_of(options, **values):
    return StudyConfig(**{"options": options, "arms": ARMS, "seeds": [0, 1, 2], **values})


def test_rates_are_chosen_on_validation_data_and_reported_on_test_data(scripted, tmp_path, drawn):
    task, options = scripted
    out, plan = tmp_path / "quality-x", make_plan(config_of(options))
    assert pending_runs(plan, out) == 5
    result, _ = run(config_of(options), out)
    # Then the other seeds at the best rate: 4e-3 would be best on test data.
    seeds = [(arm, 1e-3, seed) for seed in (1, 2) for arm in ("paca", "lora")]
    assert task.runs == TUNING + seeds
    paca, lora = result.arms["paca"], result.arms["lora"]
    assert paca.learning_rate == lora.learning_rate == 1e-3
    assert paca.values == pytest.approx({0: 1.003, 1: 1.013, 2: 1.023})
    assert (paca.mean, paca.std) == pytest.approx((1.013, 0.01))
    assert paca.rates == pytest.approx({5e-4: 5e-4, 1e-3: 0.0, 4e-3: 3e-3})
    assert (paca.at_edge, lora.at_edge, paca.comparison) == (False, True, None)
    assert lora.comparison.mean == pytest.approx(0.5)
    assert lora.comparison.p_value == lora.comparison.smallest_p_value == 0.25
    assert lora.forgetting == pytest.approx(1e-3)
    assert (paca.num_trainable_parameters, lora.num_trainable_parameters) == (400, 920)
    edge = "lora: the best rate (0.001) is at the edge of its grid (0.001, 0.004); a better one may"
    assert result.warnings == [f"{edge} lie outside."]

    names = {path.name for path in out.iterdir()}
    assert names == {".pacatune", "study.json", "report.md", "metric.png", "rates.png", "jobs"}
    assert all((out / name).stat().st_size > 5000 for name in names if ".png" in name)
    saved = json.loads((out / "study.json").read_text())
    assert (saved["finished"], saved["config"]["seeds"]) == (True, [0, 1, 2])
    assert saved["arms"]["paca"]["mean"] == paca.mean
    text = (out / "report.md").read_text()
    row = "| lora | lora | 4 | 920 | 0.001! | 1.5130 ± 0.0100 | 3 | +0.5000 ± 0.0000 | 0.25 |"
    assert f"{row} +0.0010 | 11 | 2.5 MiB |" in text
    assert "exact two-sided sign-flip permutation test, which cannot be below 0.25" in text
    assert edge in text
    for metric in ("loss", "exact_match", "accuracy"):
        (text,) = table(replace(result, metric=metric)).notes
        assert f"Each test {metric} is a mean over n runs, one for each seed (0, 1, 2)" in text

    # Finished runs are not done again.
    assert run(config_of(options), out)[0] == result
    assert (len(task.runs), pending_runs(plan, out)) == (9, 0)

    # When it is committed, its runs are lines of a table.
    collect.collect_studies([out], tmp_path)
    lines = list(collect.read_runs("quality", tmp_path))
    assert [(line["arm"], line["learning rate"], line["seed"]) for line in lines[-3:]] == [
        ("lora", "0.001", "1"),
        ("lora", "0.001", "2"),
        ("lora", "0.004", "0"),
    ]
    assert {"trained parameters", "step, ms", "kept for backward, bytes"} <= lines[-2].keys()
    assert len(lines) == 9
    assert float(lines[-2]["test loss"]) == lora.values[2]

    # A changed study reuses equal runs: one arm is the same by another name.
    task.runs.clear()
    changed = Arm(method="lora", dropout=0.1, learning_rates=[1e-3])
    arms = {"columns": ARMS["paca"], "lora": changed}
    result, _ = run(config_of(options, arms=arms, seeds=[0, 1, 2, 3], tuning_seeds=2), out)
    assert sorted(task.runs) == sorted(
        [("lora", 1e-3, seed) for seed in range(4)]
        + [("paca", rate, 1) for rate in (5e-4, 4e-3)]
        + [("paca", 1e-3, 3)]
    )
    assert list(result.arms["columns"].values) == [0, 1, 2, 3]
    assert result.arms["columns"].rates[1e-3] == pytest.approx(0.005)  # mean of two seeds


def test_grids_are_extended_where_the_best_rate_is_at_the_edge(scripted, tmp_path):
    """Validation is best at 1e-3: downwards from 2e-3 in steps of a half, upwards from 6e-4."""
    task, options = scripted
    arms = {
        "down": Arm(rank=4, learning_rates=[2e-3, 4e-3]),
        "up": Arm(method="lora", learning_rates=[2e-4, 6e-4]),
        "one": Arm(rank=2, learning_rates=[3e-3]),
    }
    config = config_of(options, arms=arms, seeds=[0], extend_grids=3)
    result, _ = run(config, tmp_path / "out")
    assert list(result.arms["down"].rates) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert list(result.arms["up"].rates) == [2e-4, 6e-4, 1.8e-3]
    assert list(result.arms["one"].rates) == [3e-3]
    assert [arm.learning_rate for arm in result.arms.values()] == [1e-3, 6e-4, 3e-3]
    assert not any(arm.at_edge for arm in result.arms.values())
    assert len(task.runs) == len(set(task.runs)) == 8
    # In one step less, the last rate is still the edge.
    once = config_of(options, arms=arms, seeds=[0], extend_grids=1)
    result, _ = run(once, tmp_path / "out")
    assert len(task.runs) == 8
    assert result.arms["down"].at_edge


def test_arms_one_after_the_other(scripted, tmp_path):
    """What is left is said; the last call knows the runs of all."""
    task, options = scripted
    out = tmp_path / "out"
    with pytest.raises(StudyPaused, match=r"paused with 4 of 9 runs done, which .*/report.md"):
        run(config_of(options), out, arms=["lora"])
    assert {method for method, _, _ in task.runs} == {"lora"}
    saved = json.loads((out / "study.json").read_text())
    assert (saved["finished"], saved["warnings"][0]) == (False, "unfinished: 4 of 9 runs.")
    assert saved["arms"]["lora"]["mean"] == pytest.approx(1.513)
    assert (saved["arms"]["paca"]["mean"], saved["arms"]["lora"]["comparison"]) == (None, None)
    assert "unfinished: 4 of 9 runs." in (out / "report.md").read_text()
    result, _ = run(config_of(options), out, arms=["paca", "lora"])
    assert len(task.runs) == len(set(task.runs)) == 9
    assert result.arms["lora"].comparison.num_seeds == 3


def test_hours(scripted, tmp_path, monkeypatch):
    """No run starts when the time is over; rates are chosen only where tuning has ended."""
    task, options = scripted
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])

    def take_an_hour(config):
        now[0] += 3600

    task.fail = take_an_hour
    for num_runs in (4, 8):
        with pytest.raises(StudyPaused):
            run(config_of(options), tmp_path / "out", max_hours=3.5)
        assert len(task.runs) == num_runs
    result, _ = run(config_of(options), tmp_path / "out", max_hours=3.5)
    assert len(task.runs) == len(set(task.runs)) == 9
    assert result.arms["paca"].mean == pytest.approx(1.013)
    assert task.runs[:5] == TUNING


def test_failed_runs_are_shown_and_done_again(scripted, tmp_path):
    """LoRA has no result at all."""
    task, options = scripted

    def fail(config):
        if config.training.learning_rate == 1e-3 or config.method == "lora":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    task.fail = fail
    result, printed = run(config_of(options), tmp_path / "out")
    paca, lora = result.arms["paca"], result.arms["lora"]
    assert paca.rates == pytest.approx({5e-4: 5e-4, 1e-3: None, 4e-3: 3e-3})
    assert paca.learning_rate == 5e-4
    message = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert paca.failures == [f"rate 0.001, seed 0: {message}"]
    assert f"paca, rate 0.001, seed 0: failed: {message}" in printed.getvalue()
    assert "paca: 1 runs failed; the next call tries again." in result.warnings
    assert f"- paca, rate 0.001, seed 0: {message}" in (tmp_path / "out" / "report.md").read_text()
    assert (lora.learning_rate, lora.mean, lora.values, lora.comparison) == (None, None, {}, None)
    assert "lora: no rate of the grid worked, so there is no result." in result.warnings
    task.fail = None
    task.runs.clear()
    result, _ = run(config_of(options), tmp_path / "out")
    assert task.runs[:2] == TUNING[1:3]
    assert [arm.failures for arm in result.arms.values()] == [[], []]
    assert result.arms["paca"].learning_rate == 1e-3


def test_what_is_refused(scripted, tmp_path):
    config = config_of(scripted[1])
    with pytest.raises(ValueError, match=r"`arms` \('lore'\) must be one of paca, lora; did you"):
        run(config, tmp_path / "out", arms=["lore"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"that a study did not write, .*\(thesis.tex\)"):
        run(config, tmp_path / "other")
    run(config, tmp_path / "out")
    damaged = next((tmp_path / "out" / "jobs").glob("[0-9a-f]*"))
    damaged.write_text('{"key": 1')
    with pytest.raises(ValueError, match=r"is no result of a job .*; delete it, and the job is"):
        run(config, tmp_path / "out")


def test_unequal_parameters_are_said(scripted, tmp_path):
    _, options = scripted
    arms = {"lora": Arm(method="lora", rank=2, learning_rates=[1e-3]), "paca": Arm()}
    config = config_of(options, arms=arms, match="parameters", learning_rates={"paca": [1e-3]})
    result, _ = run(config, tmp_path / "out")
    assert result.arms["paca"].rank == 5  # 500 are nearer to 460 than 400 are
    assert "paca: trains 500 parameters, the reference 460." in result.warnings


def test_a_signal_in_the_middle_of_a_real_run(class_options, tmp_path, monkeypatch):
    """What is finished is on the disk by then, as if the process had been killed."""
    step, measure, started = LanguageTrainer.training_step, StudyTask.run, []

    def remember(self, config):
        started.append((config.paca.r, config.training.seed))
        return measure(self, config)

    def signalled(self, *args, **kwargs):
        if len(started) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StudyTask, "run", remember)
    monkeypatch.setattr(LanguageTrainer, "training_step", signalled)
    arms = {"a": Arm(rank=2), "b": Arm(rank=4)}
    options = {"command": "classify", "learning_rates": {"paca": [1e-3]}, "seeds": [0, 1]}
    config, out = config_of(class_options, arms=arms, **options), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="stopped with 1 of 4 runs done; the same command"):
        run(config, out)
    assert json.loads((out / "study.json").read_text()) == {"finished": False}
    assert len(list((out / "jobs").glob("[!.]*"))) == 1
    monkeypatch.setattr(LanguageTrainer, "training_step", step)
    result, _ = run(config, out)
    assert started == [(2, 0), (4, 0), (4, 0), (2, 1), (4, 1)]
    assert [[*arm.values] for arm in result.arms.values()] == [[0, 1], [0, 1]]
    assert json.loads((out / "study.json").read_text())["finished"] is True
