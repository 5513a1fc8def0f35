"""The paper beside what is found here: shares, agreement, pages, and the jobs of every table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.jobs import Job, done
from experiments.paper import PAPER, Printed
from experiments.reproduce import costs, texts
from experiments.reproduce.__main__ import main
from experiments.reproduce.catalogue import EXPERIMENTS, doc_table
from experiments.reproduce.experiment import (
    NATS,
    Experiment,
    agreement,
    comparison,
    make_page,
    read_results,
    shares,
    write_results,
)
from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.provenance import commit
from pacatune.reports.rows import Row

ROOT = Path(__file__).parents[2]


def row(method, value, **more):
    values = {"what": "time", "unit": "h", "model": "big", "origin": "paper", **more}
    return Row(method=method, value=value, **values)


CLAIMS = (
    row("LoRA", 4.0),
    row("PaCA", 3.0),
    row("No tuning", 1.0, what="score", unit="points"),
    row("LoRA", 5.0, what="score", unit="points"),
    row("PaCA", 5.2, what="score", unit="points"),
)
OF_LOSS = {"what": "score", "unit": NATS, "model": "small", "origin": "measured"}
LOSSES = [row("LoRA", 3.2, **OF_LOSS), row("PaCA", 3.0, **OF_LOSS)]


PRINTED = Printed(
    name="one",
    title="A table",
    place="Table 1",
    reference="LoRA",
    units={"score": "points"},
    claims=CLAIMS,
)


def experiment(*jobs):
    return Experiment(paper=PRINTED, jobs=lambda: list(jobs))


def test_shares_of_costs_and_differences_of_scores():
    found = {(one.what, one.method): one for one in shares(PRINTED, CLAIMS)}
    assert found.keys() == {("time", "PaCA / LoRA"), ("score", "PaCA - LoRA")}
    assert found["time", "PaCA / LoRA"].value == 0.75
    assert found["score", "PaCA - LoRA"].value == pytest.approx(0.2)
    # The sign of a loss must not read like that of a score: 3.0 is better than 3.2.
    (found,) = shares(PRINTED, LOSSES)
    assert (found.method, found.value) == ("PaCA - LoRA", pytest.approx(0.2))
    # Without a reference only stated shares are compared, untrained models with nothing.
    rows = [*CLAIMS, row("LoRA / Full-FT", 0.9, unit="ratio")]
    assert list(shares(replace(PRINTED, reference=None), rows)) == rows[-1:]
    rows = [row(m, 4.0, what="score") for m in ("LoRA", "No tuning", "Quantized, no tuning")]
    assert list(shares(PRINTED, rows)) == []


def test_shares_of_estimates_divide_like_ends():
    """What an estimate leaves open, it leaves open for both: the interval must not grow."""
    sizes = [
        row("LoRA", 10.0, low=10.0, high=20.0, origin="simulated"),
        row("PaCA", 8.0, low=8.0, high=15.0, origin="simulated"),
    ]
    (found,) = shares(PRINTED, sizes)
    assert (found.low, found.value, found.high) == (0.75, 0.8, 0.8)
    (found,) = shares(PRINTED, [replace(one, origin="measured") for one in sizes])
    assert (found.low, found.high) == (8.0 / 20.0, 15.0 / 10.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"value": 0.78, "low": 0.7, "high": 0.8}, "agrees"),
        ({"value": 0.77, "low": 0.76, "high": 0.78}, "agrees"),  # within 5 %
        ({"value": 0.77, "origin": "counted"}, "agrees"),
        ({"value": 0.77}, "one run"),
        ({"value": 0.9, "low": 0.8, "high": 0.95}, "same order"),
        ({"value": 0.9, "low": 0.8, "high": 1.01}, "no significant difference"),
        ({"value": 1.2, "low": 1.1, "high": 1.3}, "other order"),
        ({"value": 0.4, "origin": "simulated"}, "same order"),
    ],
)
def test_agreement_of_shares(values, said):
    ours = row("PaCA / LoRA", unit="ratio", **{"origin": "measured", **values})
    paper = row("PaCA / LoRA", 0.75, unit="ratio")
    assert agreement(paper, ours, is_score=False) == said


@pytest.mark.parametrize(
    ("paper", "unit", "said"),
    [
        (0.2, "points", "agrees"),
        (0.2, NATS, "same order"),  # other scores agree in their order alone
        (0.0, NATS, "no significant difference"),
        (-0.2, NATS, "other order"),
    ],
)
def test_agreement_of_scores(paper, unit, said):
    ours = row("PaCA - LoRA", 0.2, unit=unit, origin="measured", low=0.1, high=0.3)
    assert agreement(row("PaCA - LoRA", paper, unit="points"), ours, is_score=True) == said


def test_smaller_models_stand_beside_one_of_the_papers():
    names = {"origin": "measured", "model": "small"}
    lora = row("LoRA", 2.0, low=1.9, high=2.1, **names)
    paca = row("PaCA", 1.5, low=1.4, high=1.6, **names)
    (line,) = comparison(experiment(), [lora, replace(paca, setting="a step"), paca]).cells
    assert line[:3] == ["time", "PaCA / LoRA", "0.750"]
    assert line[4:] == ["agrees", "small, measured"]
    assert comparison(experiment(), []) is None


def test_pages_say_what_is_missing_and_what_failed(tmp_path):
    found = {"LoRA": 2.0, "PaCA": 1.6}
    numbers = [row(m, v, origin="measured", low=v, high=v) for m, v in found.items()]

    def fail(work):
        raise OSError("no judge")

    jobs = [
        Job(key="a", inputs={}, run=lambda work: numbers),
        Job(key="b", inputs={}, run=fail, title="asking the judge"),
        Job(key="c", inputs={}, run=fail, title="never begun"),
    ]
    one = experiment(*jobs)
    folder = OwnedFolder(path=tmp_path, kind="a test")
    folder.begin()
    found = done(jobs[:2], folder)
    page = make_page(one, found)
    for text in (
        "| big | PaCA | 3 | 5.2 | 1.6 |",
        "| time | PaCA / LoRA | 0.750 | 0.800 | same order |",
        "Not run yet:\n\n- never begun",
        "Failed:\n\n- b: OSError: no judge",
        "2 jobs, ",
    ):
        assert text in page
    write_results(found, folder)
    (tmp_path / "results.json").rename(tmp_path / "one-small.json")
    (kept,) = read_results("one", tmp_path).values()
    assert kept.rows == numbers


@pytest.mark.parametrize("name", [*EXPERIMENTS, "memory"])
def test_jobs_have_keys_of_their_own_plain_inputs_and_committed_results(name):
    assert doc_table(name).startswith("| ")
    if name == "memory":
        return
    one = EXPERIMENTS[name]
    jobs = one.jobs()
    keys = {job.key for job in jobs}
    assert len(keys) == len(jobs) > 0
    json.dumps([job.inputs for job in jobs])
    # Sweeps until memory ends were measured once: their rows stay.
    assert read_results(name).keys() >= keys


def test_operations_are_counted_and_agree_with_the_text(tmp_path):
    job = EXPERIMENTS["fig2"].jobs()[0]
    compared = comparison(EXPERIMENTS["fig2"], job.run(tmp_path)).cells
    claims = {claim.what for claim in PAPER["fig2"].claims if claim.what.startswith("operations")}
    assert [line[4] for line in compared] == ["agrees"] * 3
    assert {line[0] for line in compared} == claims


def timed(method, value, **more):
    more = {"what": "step", "unit": "ms", "origin": "measured", **more}
    return row(method, value, low=0.9 * value, high=1.1 * value, **more)


def test_shares_of_times_that_took_no_turns_have_no_interval():
    times = [timed("LoRA", 9.0), timed("Full-FT", 10.0)]
    times += [timed("PaCA", 6.0, what="backward"), timed("PaCA", 5.0, what="forward")]
    turns = row("PaCA / LoRA", 0.8, what="step", unit="ratio", low=0.7, high=0.9)
    found = [
        one for one in costs.with_stated_shares("time", [*times, turns]) if one.unit == "ratio"
    ]
    assert {(one.method, one.value, one.has_interval) for one in found} == {
        ("PaCA / LoRA", 0.8, True),
        ("LoRA / Full-FT", 0.9, False),
        ("PaCA", 1.2, False),
    }
    assert found[-1].what.startswith("time of the backward pass, as a share")


def test_accuracies_keep_what_they_are_means_of():
    right = [[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    found = texts.accuracy_row(row("PaCA", 62.5, unit="%"), right)
    assert found.each == {"0": 75.0, "1": 50.0}
    assert found.n == 4
    of_questions, of_seeds = 3.182 * 23.936, 12.71 * 12.5
    assert found.high - 62.5 == pytest.approx((of_questions**2 + of_seeds**2) ** 0.5, rel=1e-3)
    assert found.low == pytest.approx(125.0 - found.high)
    one = texts.accuracy_row(row("PaCA", 75.0, unit="%"), right[:1])
    assert one.each == {"0": 100.0, "1": 0.0, "2": 100.0, "3": 100.0}
    assert one.high - 75.0 == pytest.approx(3.182 * 25.0, rel=1e-3)


def test_the_command(tmp_path, capsys, monkeypatch):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXPERIMENTS)
    with pytest.raises(SystemExit):
        main(["table5"])
    assert "--output DIR" in capsys.readouterr().err
    # A result says which commit of the experiments made it.
    numbers = [row("LoRA", 4.0, origin="counted"), row("PaCA", 3.0, origin="counted")]
    one = experiment(Job(key="a", inputs={}, run=lambda work: numbers))
    monkeypatch.setitem(EXPERIMENTS, "one", one)
    assert main(["one", "--output", str(tmp_path)]) == 0
    assert "The page is" in capsys.readouterr().out
    folder = tmp_path / "one-small"
    assert (folder / "one.md").is_file()
    (made,) = json.loads((folder / "results.json").read_text()).values()
    here = commit(ROOT, "src", "experiments", "examples")
    assert {name: made["provenance"][name] for name in here} == here


def test_wrong_input_gives_one_line(tmp_path, capsys):
    for path in ("file", "run/.pacatune/x", "other/fig2-small/fig2.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for words, said in (
        ("tabel5 new", "did you mean 'table5'?"),
        ("fig2 other", "stay as they are"),
        ("fig2 file", "file is a file"),
        ("fig2 run", "run holds the results of another command"),
    ):
        name, folder = words.split()
        assert main([name, "--output", str(tmp_path / folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert said in line
    assert sorted(tmp_path.rglob("*")) == before
