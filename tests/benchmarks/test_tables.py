"""The tables of measurements: what they show of a result file."""

import json

import pytest

from benchmarks import reproduce_tables, tables
from pacatune.experiments.reproduce.experiment import Section, Verdict
from pacatune.reports.tables import ReportTable

RESULT = {
    "command": "python -m benchmarks.step",
    "device": "a CPU, 2 cores",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "is_modified": False,
    "methods": {"paca": "ours", "lora": "PEFT's LoRA"},
    "seed": 0,
    "model": "Llama, hidden 512, 8 layers",
    "rows": [
        {"setting": "16 tokens", "method": "paca", "step_ms": 10.0},
        {"setting": "16 tokens", "method": "lora", "step_ms": 12.5},
        {"setting": "512 tokens", "method": "paca", "step_ms": 123.456},
        {"setting": "512 tokens", "method": "lora", "step_ms": 100.0},
    ],
}


def write(folder, result):
    (folder / "step.json").write_text(json.dumps(result))


def test_table_shows_times_shares_and_where_they_come_from(tmp_path):
    write(tmp_path, RESULT)
    lines = tables.table("step", tmp_path).splitlines()
    assert lines[0] == "| step, ms (PaCA's share) | paca | lora |"
    assert lines[2] == "| 16 tokens | 10 | 12.5 (0.80) |"
    assert lines[3] == "| 512 tokens | 123.5 | 100 (1.23) |"
    assert lines[5] == "`paca`: ours; `lora`: PEFT's LoRA."
    assert "on a CPU, 2 cores (torch 2.13.0)" in lines[-1]
    assert "at commit 012345678 wrote" in lines[-1]


def test_shares_of_next_to_nothing_are_left_out(tmp_path):
    rows = [{**row, "counted": "1 image", "dtype": "float32"} for row in RESULT["rows"][:2]]
    kept = [{**row, "saved_bytes": n} for row, n in zip(rows, (5_000_000, 1_000), strict=True)]
    write(tmp_path, RESULT | {"rows": kept})
    assert tables.byte_table("step", tmp_path).splitlines()[2] == (
        "| 1 image, float32 | 5 | 0.001 |"
    )


def test_uncommitted_changes_are_told(tmp_path):
    write(tmp_path, RESULT | {"is_modified": True})
    assert "012345678, with changes that were not committed, wrote" in tables.table(
        "step", tmp_path
    )


def test_missing_result_says_how_to_make_it(tmp_path):
    assert tables.table("step", tmp_path).startswith("Not measured yet: `make bench` writes")


def test_setting_without_a_method_is_refused(tmp_path):
    write(tmp_path, RESULT | {"rows": RESULT["rows"][:3]})
    with pytest.raises(ValueError, match=r"'512 tokens' has .*; measure all methods in all"):
        tables.table("step", tmp_path)


def test_reproduction_has_a_line_for_each_name_and_for_each_share(tmp_path):
    head = ["model", "method", "rank", "paper, h", "paper, as a share of LoRA's"]
    head += ["ours, as a share of LoRA's", "difference"]
    rows = [["small", "LoRA", "8", "4", "1.00", "1.00", "+0.00"]]
    rows += [
        ["small", "PaCA", rank, "3", "0.75", here, "+0.05"]
        for rank, here in (("8", "0.80"), ("16", "0.90"))
    ]
    found = ["agrees"] * 3 + ["cannot_tell"] * 4 + ["open"] * 2 + ["contradicts"]
    part = Section(
        name="table1",
        title="",
        place="",
        about=[],
        verdicts=[Verdict(outcome=outcome, origin="measured", text="") for outcome in found],
        rates={"a line": True, "another": False},
        tables=[
            ReportTable(title="What the paper reports", header=["model", "method"], rows=[]),
            ReportTable(title="Time of a step", header=head, rows=rows),
        ],
        numbers={"cells": {"bench": {"seconds": 60.0}, "train": {"seconds": 30.0}}},
    )
    lines = list(reproduce_tables.outcomes([part]))
    assert lines[2:] == ["| `table1` | measured | 3 | 4 | 2 | 1 | 1 of 2 | 1.5 |"]
    line = "| `table1` | time of a step, as a share of LoRA's | 0.75 | 0.80 | small |"
    assert list(reproduce_tables.shares([part]))[2:] == [line]
    with pytest.raises(ValueError, match="no table 'other'"):
        tables.table("reproduce-other", tmp_path)


LEAN = RESULT | {
    "counts": [
        {"method": m, "adapters": "bfloat16", "variant": v, "is_padded": padded, "units": units}
        for m, v, padded, units in (
            ("paca", "level 1", False, 23.06),
            ("paca", "level 1", True, 99.0),
            ("paca", "level 2", False, 9.06),
            ("lora", "level 1", False, 34.1),
            ("lora", "inputs", False, 23.1),
        )
    ],
    "ratios": [
        {"method": m, "variant": v, "reference": r, "setting": "512 tokens, float32"}
        | {"ratio": 1.2, "low": 1.1, "high": 1.25}
        for m, v, r in (
            ("paca", "level 1", "plain"),
            ("paca", "level 2", "level 1"),
            ("lora", "level 2", "level 1"),
        )
    ],
}


def test_tables_of_lean_levels(tmp_path):
    assert "Not measured yet: `python -m benchmarks.lean`" in tables.table("lean-units", tmp_path)
    (tmp_path / "lean.json").write_text(json.dumps(LEAN))
    lines = tables.table("lean-units", tmp_path).splitlines()
    assert lines[0] == "| | PaCA | LoRA |"
    assert [line.partition(":")[0] for line in lines[2:5]] == ["| level 1", "| inputs", "| level 2"]
    assert lines[3].endswith(" |  | 23.10 |")
    lines = tables.table("lean-times", tmp_path).splitlines()
    assert lines[0] == "| | PaCA, 512 tokens, float32 | LoRA, 512 tokens, float32 |"
    assert lines[2] == "| level 2 | 1.20 (1.10-1.25) | 1.20 (1.10-1.25) |"
    assert "(on a CPU, 2 cores, torch 2.13.0)." in lines[-1]


def test_table_of_lengths(tmp_path):
    row = {"method": "paca", "adapters": "float32", "level": 2, "max_seq_len": 50258}
    row |= {"checkpointing": False, "offloading": True, "saved_bytes_per_token": 1_190_000}
    (tmp_path / "lengths.json").write_text(json.dumps(RESULT | {"rows": [row]}))
    lines = tables.table("lengths", tmp_path).splitlines()
    assert lines[2] == "| PaCA | float32 | 2 | offloading | 50,258 | 1190 |"


def test_table_of_lengths_on_a_small_gpu(tmp_path):
    rows = [
        {"model": "one", "quantization": quantization, "checkpointing": way, "max_seq_len": number}
        for quantization, numbers in ((None, (1000, 2000)), ("nf4", (3000, 4000)))
        for way, number in zip((False, True), numbers, strict=True)
    ]
    (tmp_path / "lengths.json").write_text(json.dumps(RESULT | {"small_rows": rows}))
    lines = tables.table("small-lengths", tmp_path).splitlines()
    assert lines[2:4] == [
        "| one | bfloat16 | 1,000 | 2,000 |",
        "| one | nf4 (QPaCA) | 3,000 | 4,000 |",
    ]
