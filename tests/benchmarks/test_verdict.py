"""The rules of the study at equal cost, on runs that are made up."""

import csv
import json

import pytest

from benchmarks import verdict


def runs_of(losses, *, rate=1e-3, kept=100.0, rise=1.0, validation=1.0, **more):
    """Runs of one rate, with the test losses of seeds 0, 1, ..."""
    return [
        {
            "learning rate": rate,
            "seed": float(seed),
            "validation loss": validation,
            "test loss": loss,
            "kept for backward, bytes": kept,
            "general loss before": 2.0,
            "general loss after": 2.0 + rise,
            **more,
        }
        for seed, loss in enumerate(losses)
    ]


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


NEAR = [0.50, 0.54, 0.46, 0.52, 0.48]


def less(by, noise=(0.0, 0.001, -0.001, 0.002, -0.002)):
    return [loss - by + more for loss, more in zip(NEAR, noise, strict=True)]


def test_the_rate_is_chosen_by_validation_over_the_seeds_that_three_rates_have():
    rates = [runs_of(NEAR[:3], rate=1e-3, validation=0.5), runs_of(NEAR, rate=2e-3, validation=0.4)]
    rates += [runs_of(NEAR[:3], rate=4e-3, validation=0.6)]
    # Its third seed failed; those beyond it left after the first stage.
    others = [runs_of(NEAR[:2], rate=rate, validation=0.1) for rate in (8e-3, 16e-3, 32e-3, 64e-3)]
    found = verdict.chosen([run for one in (*rates, *others) for run in one])
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert {run["learning rate"] for run in found.values()} == {2e-3}


def test_better_worse_and_not_told_apart():
    study = {"paca8": runs_of(NEAR), "lora8": runs_of(less(0.1)), "rslora8": runs_of(less(-0.1))}
    study |= {"dora8": runs_of(less(0.0, (0.05, -0.05, 0.02, -0.02, 0.01)))}
    study |= {"shira8": runs_of([0.1, 0.1])}  # left after the first stage
    found = {other: said[0] for (_, other), said in verdict.compared(study).items()}
    assert found == {"lora8": "worse", "rslora8": "better", "dora8": "not told apart"}
    _, mean, half = verdict.compared(study)["paca8", "lora8"]
    assert mean == pytest.approx(0.1)
    assert 0 < half < 0.01


def test_scores_are_compared_with_the_first_seed_by_seed(tmp_path):
    """Where there is an accuracy it is compared, and chose the rate, as in the study of columns."""
    rates = {1e-3: (0.7, [0.6, 0.8]), 2e-3: (0.6, [0.9, 0.9])}
    rows = [
        {"study": "selection-a", "arm": arm, "learning rate": rate, "seed": seed}
        | {"validation accuracy": chosen_by, "test accuracy": score + more}
        for arm, more in (("random", 0.0), ("gradient", 0.1))
        for rate, (chosen_by, scores) in rates.items()
        for seed, score in enumerate(scores)
    ]
    write(tmp_path / "selection.csv", rows)
    (found,) = verdict.differences(tmp_path, "selection", "random")
    assert (found.method, found.model, found.what) == ("gradient", "a", "test accuracy")
    # The same for both seeds.
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))
    assert "| gradient | 10.00 |" in verdict.block("selection", tmp_path)


def test_two_of_paca_are_compared_once_and_all_of_its_settings_by_themselves():
    study = {"paca8": runs_of(NEAR), "spread16": runs_of(less(0.1)), "lora8": runs_of(NEAR)}
    study["paca16"] = runs_of(NEAR, validation=2.0, kept=150.0)
    pairs = [("paca8", "spread16"), ("paca8", "lora8"), ("spread16", "lora8")]
    assert list(verdict.compared(study)) == pairs
    study["spread16"] = runs_of(less(0.1), kept=300.0)
    found = {pair: said for pair, (said, *_) in verdict.settings(study).items()}
    assert found == {
        ("paca8", "paca16"): "not told apart",
        ("paca8", "spread16"): "worse",
        ("paca16", "spread16"): "worse",
    }


def test_holm_takes_the_least_times_the_most():
    found = verdict.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})  # 3, 2 and 1 times; rising


def test_cost_is_bytes_and_time():
    study = {"paca8": runs_of(NEAR), "lora8": runs_of(NEAR, kept=200.0)}
    assert verdict.costs_no_more("paca8", "lora8", study, {"paca8": 1.02, "lora8": 1.0})
    assert not verdict.costs_no_more("paca8", "lora8", study, {"paca8": 1.1, "lora8": 1.0})
    assert not verdict.costs_no_more("lora8", "paca8", study, {"paca8": 1.0, "lora8": 0.5})


def test_forgetting_at_equal_loss_goes_along_the_frontier():
    part = {"test loss at 0.5": 0.8, "general loss at 0.5": 2.2}
    ours = runs_of([0.4], rise=1.0, **part) + runs_of([0.6], rate=2e-3, rise=2.0)  # is beaten
    theirs = runs_of([0.6], rise=3.0)
    study = {"paca8": ours, "lora8": theirs}
    # Halfway between (0.4, 1.0) and (0.8, 0.2), and 3.0 of LoRA at its own.
    (found,) = verdict.forgotten(study, "paca8", "lora8", "general")
    assert found == pytest.approx((0.6, 0.6, 3.0))


def test_runs_are_read(tmp_path):
    rows = [{"study": "cost-minilm", "arm": "paca8", "key": "0f", "unknown": ""}]
    rows[0] |= {name: str(value) for name, value in runs_of([0.5])[0].items()}
    write(tmp_path / "cost.csv", rows)
    assert verdict.studies(tmp_path) == {"cost-minilm": {"paca8": runs_of([0.5])}}


@pytest.fixture
def results(tmp_path):
    """PaCA of r = 8 is worse than LoRA, which keeps more, and better than DoRA, which has 1.0."""
    more = {"test accuracy": 0.9}
    study = {"paca8": runs_of(NEAR, **more), "lora8": runs_of(less(0.1), kept=200.0, **more)}
    study["lora8"] += runs_of(less(0.1), rate=2e-3, validation=2.0, rise=3.0, kept=200.0, **more)
    study["dora8"] = runs_of(less(-0.1), kept=50.0, validation=0.5, **more)
    study["rslora8"] = runs_of(NEAR[:2], **more)  # left after the first stage
    rows = [
        {"study": "cost-minilm", "arm": arm, **run} for arm, runs in study.items() for run in runs
    ]
    write(tmp_path / "cost.csv", rows)
    steps = [
        {"what": "step", "method": arm, "value": ms, "unit": "ms", "model": "cost-minilm"}
        for arm, ms in (("paca8", 10.0), ("lora8", 15.0), ("dora8", 15.0), ("rslora8", 15.0))
    ]
    share = {"method": "lora8 / paca8", "value": 1.5, "unit": "ratio", "low": 1.4, "high": 1.6}
    steps.append({"what": "step", "model": "cost-minilm", **share})
    steps.append({"what": "state", "method": "lora8", "value": 2048.0, "unit": "bytes"})
    (tmp_path / "cost-minilm.json").write_text(json.dumps({"rows": steps}))
    return tmp_path


def test_the_arms_of_a_task(results):
    lines = verdict.block("minilm", results).splitlines()
    assert lines[0].endswith("| adapter, gradient, state of LLaMA3-8B | rise of the general loss |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| paca8", "| lora8", "| dora8"]
    assert lines[3].startswith("| lora8 | 0.001 | 0.400 ± 0.0")
    assert lines[3].endswith(
        "| 90.0 ± 0.0 | 200 B | 1.500 (1.400 to 1.600) | 2.0 KiB | 1.000 ± 0.000 |"
    )
    assert lines[2].endswith("| 100 B | 1 | - | 1.000 ± 0.000 |")


def test_what_is_said_at_equal_cost_and_against_what_costs_less(results):
    better, worse, same, than_less, settings = verdict.block("said", results).splitlines()
    assert settings == "- **Of settings of PaCA, worse than a dearer one:** none."
    assert better == "- **Better than:** none."
    task = "MiniLM-L6, types of questions"
    assert worse.startswith(f"- **Worse than:** {task}: `paca8` than `lora8` (+0.100 ± 0.00")
    assert same == "- **Not told apart from:** none."
    assert than_less.startswith(
        f"- **Better than an arm that costs less:** {task}: `paca8` than `dora8` (-0.100 ± 0.00"
    )


def test_rates_and_forgetting(results):
    lines = verdict.block("rates", results).splitlines()
    assert lines[0] == "| arm | MiniLM-L6, types of questions |"
    assert lines[2:] == [
        "| paca8 | 0.001: 1.000 |",
        "| lora8 | 0.001: 1.000 |",
        "| dora8 | 0.001: 0.500 |",
        "| rslora8 | 0.001: 1.000 |",
    ]
    (_, _, line) = verdict.block("forgetting", results).splitlines()
    start = "| MiniLM-L6, types of questions | general | paca8 | lora8 | 0.500 | 1.000 | 1.000 | "
    assert line == f"{start}+0.000 ± 0.000 | 1.00 |"


def test_the_rows_of_the_readme(results):
    path = results / "cost.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    own = {"arm": "rslora16", "learning rate": "0.004", "validation loss": "0.1"}
    write(path, rows + [row | own for row in rows if row["arm"] == "paca8"])
    losses, rises = verdict.first_rows(results)
    assert losses == [
        "test loss, 1 tasks ([which](docs/quality.md))",
        "`paca8`; the other PaCA with the least validation loss ()",
        "`paca8`: worse on MiniLM-L6, types of questions",
        "`paca8`: not told apart on 1",
    ]
    assert rises[0].endswith("at equal test loss, minus theirs: MiniLM-L6, types of questions")
    assert rises[1:] == ["`paca8`", "+0.000 ± 0.000", "+0.000 ± 0.000"]


def test_what_is_not_there_is_said(results):
    with pytest.raises(ValueError, match="no table 'dinov2' of a study; there are selection, said"):
        verdict.block("dinov2", results)
    text = (results / "cost.csv").read_text().replace("cost-minilm", "cost-dinov2")
    (results / "cost.csv").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"cost-dinov2\.json is missing; .*\.cost` writes"):
        verdict.block("said", results)
