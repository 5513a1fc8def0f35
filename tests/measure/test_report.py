"""The folder, the page and the pictures of a result."""

import pytest

from pacatune.measure import pictures
from pacatune.measure.bench import result_folder
from pacatune.measure.pictures import save_pictures
from pacatune.measure.report import make_report, measured_ratio
from pacatune.paper import ratios as paper

PNG = b"\x89PNG"
RATIO = {"low": 0.7, "high": 0.9, "ratio_of_minima": 0.8}


def row(method, **changes):
    times = {
        f"{name}_ms{part}": value
        for name, value in (("step", 6.0), ("forward", 1.0), ("backward", 3.0), ("optimizer", 2.0))
        for part in ("", "_quartile_1", "_quartile_3", "_min")
    }
    return {
        "setting": "2 x 8 tokens",
        "method": method,
        "status": "measured",
        "num_trainable_parameters": 1234,
        "forward_flops": 2 * 10**9,
        "backward_flops": 3 * 10**9,
        "saved_bytes": 3 * 2**20,
        "saved_bytes_by_kind": {"linear": 2**20, "other": 2**21},
        "peak_bytes": 2**22,
        "tokens_per_second": 2666.0,
        "sentences_per_second": 333.0,
        **times,
        **changes,
    }


def _noise(*cores):
    return [{"num_cores_of_others": number} for number in cores]


@pytest.fixture
def result():
    parts = {"forward": {"ratio": 0.5, **RATIO}, "backward": {"ratio": 0.6, **RATIO}}
    pair = {"setting": "2 x 8 tokens", "method": "paca", "reference": "lora"}
    return {
        "model": "Llama 32x2, random weights, float32",
        "command": "pacatune bench --shape 32x2",
        "commit": "0123456789abcdef",
        "is_modified": False,
        "device": "a CPU, 1 threads",
        "date": "2026-11-24T00:00:00+00:00",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "methods": {"paca": "ours", "lora": "PEFT's LoRA", "full": "every weight trained"},
        "config": {"sweep": None},
        "rows": [
            row("paca", step_ms=4.0, forward_flops=10**9, noise=_noise(0.1)),
            row("lora", peak_bytes=2**23, timed_apart_from=["paca"], noise=_noise(0.4, None)),
            {
                "setting": "2 x 8 tokens",
                "method": "full",
                "status": "out of memory",
                "reason": "no more",
            },
        ],
        "ratios": [{**pair, "ratio": 0.75, **RATIO, **parts}],
    }


@pytest.fixture
def sweep_result(result):
    limit = {"is_memory_the_limit": True, "next_failed": 3, "reason": "no more"}
    points = [
        row(method, num_rows=rows, num_tokens=8, step_ms=2.0 * rows)
        for method in ("paca", "lora")
        for rows in (1, 2)
    ]
    del result["rows"], result["ratios"]
    return result | {
        "config": {"sweep": "batch"},
        "limits": [{"method": m, "sweep": "batch", "limit": 2, **limit} for m in ("paca", "lora")],
        "points": points,
    }


def test_a_page_shows_all_that_was_measured(result):
    page = make_report(result, ["times.png"])
    for line in (
        "# Llama 32x2, random weights, float32",
        "(torch 2.13.0). Other processes kept at most 0.4 cores busy meanwhile.",
        "`pacatune bench --shape 32x2` at commit 012345678 on a CPU, 1 threads",
        "| paca | 1 | 3 | 2 | 4 (6-6) | 2,666 | 333 |",
        "| full | - | - | - | out of memory | - | - |",
        "| paca | 1,234 | 1 | 3 | 3.0 MiB | 4.0 MiB |",
        "| method | linear | other |",
        "| paca | 1.0 MiB | 2.0 MiB |",
        "| paca / lora | 0.750 (0.70-0.90) | 0.500 (0.70-0.90) | 0.600 (0.70-0.90) |",
        "`full`: out of memory (no more).",
        "`lora` did not fit beside paca: timed alone.",
        "![times.png](times.png)",
    ):
        assert line in page
    assert "| step: paca / lora | 0.81 | 0.75 | 'PaCA provides a 19% reduction" in page
    assert "lora / full" not in page  # full was not measured


def test_quantities_are_compared_as_the_paper_means_them(result):
    here = {
        (stated.quantity, stated.method, stated.reference): measured_ratio(
            result, "2 x 8 tokens", stated
        )
        for stated in paper.RATIOS
    }
    assert here["step", "paca", "lora"] == 0.75
    assert here["forward", "paca", "lora"] == 0.5
    assert here["backward", "paca", "lora"] == 0.6
    assert here["step", "lora", "full"] is None
    result["rows"][2] = row("full", step_ms=3.0, forward_flops=7 * 10**9)
    stated = [r for r in paper.RATIOS if (r.method, r.reference) == ("lora", "full")]
    measured = {r.quantity: measured_ratio(result, "2 x 8 tokens", r) for r in stated}
    assert measured == {"flops": 0.5, "step": 2.0, "forward": 1.0}
    peak = paper.PaperRatio(
        quantity="peak", method="paca", reference="lora", ratio=1.0, source="none"
    )
    assert measured_ratio(result, "2 x 8 tokens", peak) == 0.5


def test_a_page_shows_sweeps_and_the_papers(sweep_result):
    page = make_report(sweep_result, [])
    assert "| paca | 2 | memory: 3 failed (no more) |" in page
    assert "| lora | 2 | 333 | 2,666 | 4 | 4.0 MiB |" in page
    assert "10.36 sentences/s, 1.16 of LoRA's, at 1.33 of its batch" in page
    sweep_result["config"]["sweep"] = "seq-len"
    sweep_result["limits"] = [
        {"method": m, "sweep": "seq-len", "limit": 9000, "is_memory_the_limit": False}
        for m in ("paca", "full")
    ]
    page = make_report(sweep_result, [])
    assert "| paca | 9,000 | the largest tried | 9.8K |" in page
    assert "| full | 9,000 | the largest tried | - |" in page


def test_pictures_are_drawn_of_what_there_is(result, sweep_result, tmp_path):
    rows = result | {"rows": [row("paca"), row("lora")], "ratios": []}
    assert save_pictures(rows, tmp_path) == ["operations.png", "times.png", "memory.png"]
    assert save_pictures(sweep_result, tmp_path) == ["throughput.png"]
    sweep_result["config"] = {"sweep": "seq-len"}
    sweep_result["points"] = []
    assert save_pictures(sweep_result, tmp_path) == ["lengths.png"]
    for name in ("operations", "times", "memory", "throughput", "lengths"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert save_pictures({"config": {"sweep": None}, "rows": []}, tmp_path) == []


def test_ours_stand_beside_the_papers_with_their_values(result):
    figure = pictures._times(result)
    assert figure.axes[0].get_title() == "2 x 8 tokens"
    beside = figure.axes[-1]
    names = [label.get_text() for label in beside.get_yticklabels()]
    assert set(names) == {f"{phase}: paca / lora" for phase in ("step", "forward", "backward")}
    assert [text.get_text() for text in beside.get_legend().get_texts()] == [
        "paper: LLaMA3-8B, A100",
        "here: 2 x 8 tokens",
    ]
    values = {text.get_text() for text in beside.texts}
    assert {"0.81", "0.75", "0.50"} <= values


def test_sweeps_stand_beside_the_papers_with_their_values(sweep_result):
    beside = pictures._throughput(sweep_result).axes[-1]
    assert {text.get_text() for text in beside.texts} == {"1.16", "1.33", "1.21", "1.00"}
    sweep_result["config"] = {"sweep": "seq-len"}
    sweep_result["limits"] = [{"method": "paca", "limit": 9000}, {"method": "lora", "limit": 6000}]
    beside = pictures._lengths(sweep_result).axes[-1]
    assert "1.50" in {text.get_text() for text in beside.texts}


def test_a_folder_is_only_ever_the_benchmarks_own(tmp_path):
    folder = tmp_path / "out"
    result_folder(folder).start_anew()
    result_folder(folder).write_json("bench.json", {"finished": True})
    (folder / "times.png").touch()
    with pytest.raises(FileExistsError, match=r"that a benchmark did not write, .*\(times.png\)"):
        result_folder(folder).start_anew()
    (folder / "times.png").unlink()
    result_folder(folder).start_anew()
    assert [path.name for path in folder.iterdir()] == [".pacatune"]
