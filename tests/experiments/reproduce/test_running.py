"""Runs of experiments: what is written when, and that a killed run goes on."""

import json
import shlex
from pathlib import Path

import pytest

from experiments.mt_bench.config import MtBenchConfig
from pacatune.cli.options import parser_of
from pacatune.experiments import reproduce
from pacatune.experiments.reproduce import EXPERIMENTS
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Section
from pacatune.experiments.reproduce.running import (
    CellStore,
    open_folder,
    result_folder,
    run_experiments,
    write_report,
)
from tools.cli_reference import find_parser


def make_experiment(name, run, **changes):
    def cells(mode):
        return [
            Cell(key=m, title=f"{m} of {name}", methods=(m,), inputs={"mode": mode}, run=run)
            for m in ("lora", "paca")
        ]

    def section(mode, results):
        about = [f"{key} found {result['value']}" for key, result in results.items()]
        return Section(name=name, title=f"The {name}", place="a place", about=about)

    values = {"methods": ("lora", "paca"), "settings": lambda scale: [], "cannot": {}}
    return Experiment(
        name=name,
        title=f"The {name}",
        place="a place",
        cells=cells,
        section=section,
        **values | changes,
    )


@pytest.fixture
def calls():
    return []


@pytest.fixture
def experiments(calls):
    def run(folder, tell):
        calls.append(folder.name)
        return {"value": len(calls)}

    return [make_experiment("first", run), make_experiment("second", run)]


def go(experiments, folder, only=None, resume=False):
    lines = []
    with open_folder(folder, resume=resume):
        sections = run_experiments(experiments, "small", folder, "a command", lines.append, only)
    return sections, lines


def test_each_experiment_has_its_report(experiments, calls, tmp_path):
    sections, lines = go(experiments, tmp_path / "out")
    assert len(calls) == 4
    assert lines[0] == "first 1/2: lora of first ..."
    for name in ("first", "second"):
        assert f"The {name}" in (tmp_path / "out" / f"{name}.html").read_text()
        values = json.loads((tmp_path / "out" / f"{name}.json").read_text())[name]
        assert values["missing"] == []
        assert values["cells"]["paca"]["result"]["value"] in (2, 4)
    mark = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert mark["finished"] is True
    assert mark["command"] == "a command"
    write_report(sections, "all", "Everything", result_folder(tmp_path / "out"))
    page = (tmp_path / "out" / "all.md").read_text()
    assert page.index("The first") < page.index("The second")
    assert "lora found 1" in page


def test_a_killed_run_goes_on_where_it_was(tmp_path, calls):
    def run(folder, tell):
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"value": len(calls)}

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="in: paca of first; the same command with --res"):
        go([make_experiment("first", run)], folder)
    assert json.loads((folder / "reproduce.json").read_text()) == {"finished": False}
    sections, lines = go([make_experiment("first", run)], folder, resume=True)
    assert lines == ["first 1/2: lora of first kept", "first 2/2: paca of first ..."]
    assert len(calls) == 3
    assert sections[0].about == ["lora found 1", "paca found 3"]


def test_the_machine_is_the_one_that_measured(experiments, tmp_path, monkeypatch):
    """A report made again elsewhere once named the machine that made the report."""
    monkeypatch.setattr("pacatune.experiments.reproduce.running.cpu_name", lambda: "Some Processor")
    monkeypatch.setattr("pacatune.experiments.reproduce.running.num_cores", lambda: 3)
    go(experiments, tmp_path / "out")
    monkeypatch.setattr("pacatune.experiments.reproduce.running.cpu_name", lambda: "Another")
    (section, _), _ = go(experiments, tmp_path / "out", resume=True)
    assert " minutes on Some Processor, 3 cores (" in section.provenance
    path = tmp_path / "out" / "cells" / "first" / "lora.json"
    kept = json.loads(path.read_text())
    del kept["machine"]
    path.write_text(json.dumps(kept))
    (section, _), _ = go(experiments, tmp_path / "out", resume=True)
    assert "on Some Processor, 3 cores and a machine that was not recorded (" in section.provenance


def test_a_cell_that_fails_stops_no_other(tmp_path, calls):
    def run(folder, tell):
        calls.append(folder.name)
        if len(calls) == 1:
            raise RuntimeError("no more  memory")
        return {"value": len(calls)}

    folder = tmp_path / "out"
    sections, lines = go([make_experiment("first", run)], folder)
    assert sections[0].failures == {"lora": "RuntimeError: no more memory"}
    assert sections[0].missing == ["lora of first (failed: RuntimeError: no more memory)"]
    assert sections[0].about == ["paca found 2"]
    (failed,) = [
        line for line in lines if line.startswith("  failed: RuntimeError: no more memory")
    ]
    (path,) = folder.glob("cells/first/work/lora-*/failure.txt")
    assert str(path) in failed
    assert "Traceback" in path.read_text()
    sections, _ = go([make_experiment("first", run)], folder, resume=True)
    assert (sections[0].failures, len(calls)) == ({}, 3)


def test_only_one_method_leaves_others_alone(experiments, calls, tmp_path):
    folder = tmp_path / "out"
    sections, _ = go(experiments[:1], folder, only="paca")
    assert sections[0].missing == ["lora of first"]
    assert json.loads((folder / "reproduce.json").read_text())["finished"] is False
    sections, _ = go(experiments[:1], folder, only="lora", resume=True)
    assert (sections[0].missing, len(calls)) == ([], 2)


def test_what_a_mode_lacks_is_said_and_left_out(calls, tmp_path):
    def run(folder, tell):
        calls.append(folder)
        return {"value": 1}

    cannot = make_experiment("first", run, cannot={"small": "there is none."})
    sections, lines = go([cannot], tmp_path / "out")
    assert (sections, lines, calls) == ([], ["first: there is none."], [])


def commands(cells, key):
    (cell,) = [cell for cell in cells if cell.key == key]
    return cell.inputs["commands"]


def test_commands_of_the_full_scale_are_those_of_the_evaluations():
    """Their own parsers take every word; a wrong one would end the process."""
    cells = {name: EXPERIMENTS[name].cells("full") for name in ("table1", "table3")}
    (line,) = commands(cells["table3"], "full-llama3-8b-quantized")
    parsed = parser_of("mt-bench", MtBenchConfig).parse_args(shlex.split(line)[3:])
    assert (parsed.quantization, parsed.judge_model) == ("nf4", "gpt-4o-mini")
    assert parsed.judge_key_env == "OPENAI_API_KEY"
    train, line = commands(cells["table1"], "full-llama3-8b-paca-r8")
    assert train == "pacatune train --config RUN.yaml"
    parsed = find_parser("evaluate-mmlu").parse_args(shlex.split(line)[3:])
    assert (parsed.model, parsed.adapter) == ("meta-llama/Meta-Llama-3-8B", "RUN")
    assert parsed.output == "DIR"


def test_reproduction_knows_no_command_line():
    """It does what it does in this process, by functions."""
    folder = Path(reproduce.__file__).parent
    assert not [path for path in folder.glob("*.py") if "pacatune.cli" in path.read_text()]


@pytest.fixture
def store(tmp_path):
    output = result_folder(tmp_path)
    output.begin()
    return CellStore(output, "table9")


def make_cell(run=None, **inputs):
    return Cell(
        key="one",
        title="a cell",
        methods=("paca",),
        inputs={"sizes": (1, 2), **inputs},
        run=run or (lambda folder, tell: {"value": 7}),
    )


def test_a_result_is_computed_once(store):
    assert store.find(make_cell()) is None
    kept = store.compute(make_cell(), print)
    assert kept["result"] == {"value": 7}
    assert "torch" in kept["versions"]
    assert store.find(make_cell()) == kept


def test_other_inputs_are_another_result(store):
    store.compute(make_cell(rank=8), print)
    assert store.find(make_cell(rank=16)) is None
    assert store.find(make_cell(rank=8))["result"] == {"value": 7}


def test_a_failed_cell_leaves_nothing(store):
    def fail(folder, tell):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.compute(make_cell(fail), print)
    assert store.find(make_cell()) is None


def test_a_file_cut_off_in_the_middle_is_made_again(store):
    store.compute(make_cell(), print)
    path = store.folder / "one.json"
    path.write_text(path.read_text()[:40])
    assert store.find(make_cell()) is None
    path.write_text(json.dumps({"inputs": {"sizes": [1, 2]}}))
    assert store.find(make_cell()) is None


def test_each_input_has_its_own_folder_for_what_is_half_done(store):
    folders = []

    def note(folder, tell):
        folders.append(folder)
        return {}

    store.compute(make_cell(note), print)
    store.compute(make_cell(note), print)
    store.compute(make_cell(note, rank=1), print)
    assert folders[0] == folders[1] != folders[2]
