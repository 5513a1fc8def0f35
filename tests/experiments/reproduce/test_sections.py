"""Each experiment's report, on made-up results: our numbers are where they belong."""

import pytest

from pacatune.experiments.reproduce import EXPERIMENTS
from pacatune.experiments.reproduce.page import make_markdown
from tests.experiments.reproduce.results import made_up

MODES = [
    (name, mode)
    for name, experiment in EXPERIMENTS.items()
    for mode in ("simulate", "small", "full")
    if mode not in experiment.cannot
]


def section_of(name, mode, without=()):
    results = {k: v for k, v in made_up(name, mode).items() if not k.startswith(tuple(without))}
    return EXPERIMENTS[name].section(mode, results)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_every_cell_reaches_the_report(name, mode):
    """Without the result of one kind of cell, a table or a verdict is missing."""
    whole = section_of(name, mode)
    page = make_markdown([whole], "A report")
    assert whole.charts
    for kind in {key.partition("-")[0] for key in made_up(name, mode)}:
        assert make_markdown([section_of(name, mode, (kind,))], "A report") != page


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_report_on_nothing_is_a_report(name, mode):
    page = make_markdown([EXPERIMENTS[name].section(mode, {})], "A report")
    assert EXPERIMENTS[name].title in page


def lines_of(name, mode):
    return make_markdown([section_of(name, mode)], "A report").splitlines()


def test_table_1_at_the_small_scale():
    lines = lines_of("table1", "small")
    # 80 / 100 of LoRA's step, by the pair that took turns; 3.5 h and 4.4 h in the paper.
    assert "| Llama 512x8 | PaCA | 8 | 1 | llama3-8b | 8 | 3.5 | 0.80 | 0.80 | +0.00 |" in lines
    assert "| Llama 512x8 | DoRA | 8 | 200 | llama3-8b | 8 | 33 | 1.22 | 2.00 | +0.78 |" in lines
    found = [line for line in lines if line.startswith("| SmolLM2-135M-Instruct | PaCA | 16 | 50")]
    assert [line.split(" | ")[-5:-2] for line in found] == [["llama3-8b", "16", "65.4"]]


def test_table_1_at_the_full_scale():
    lines = lines_of("table1", "full")
    assert "| llama3-8b | PaCA | 8 | 23 | 25 | +8.7% |" in lines
    assert "| llama3-8b | PaCA | 8 | 3.5 | 4 | +14.3% |" in lines
    assert "| llama3-8b | No tuning | - | 64.9 | 62.5 (61.5 to 63.5) | -2.40 |" in lines


def test_table_3_names_the_tokens_that_explain_it():
    results = made_up("table3", "simulate")
    for result in results.values():
        result |= {"tokens_that_explain_it": 1466, "tokens": 3072}
    page = make_markdown([EXPERIMENTS["table3"].section("simulate", results)], "A report")
    assert "QPaCA (rank 64): 1,466 tokens per micro-batch would take the paper's memory" in page


def test_table_5_has_the_paper_s_strategies():
    lines = lines_of("table5", "small")
    shown = [line for line in lines if line.startswith("| SmolLM2-135M-Instruct | PaCA, ")]
    assert sum("PaCA, gradient | 64 | 2.5 (" in line for line in shown) == 1
    assert sum("| llama3-8b | 64 | 5.24 | " in line for line in shown) == 1


@pytest.mark.parametrize("name", ["table1", "fig2", "fig3"])
def test_pictures_are_drawn(name):
    for chart in section_of(name, "small").charts:
        assert chart.svg.startswith("<svg")
        assert chart.svg.rstrip().endswith("</svg>")


def test_less_loss_is_a_better_score():
    results = made_up("table2", "small")
    results["small-llama3-8b-paca-r64"] |= {"values": {"0": 3.0, "1": 3.0}, "mean": 3.0}
    section = EXPERIMENTS["table2"].section("small", results)
    texts = [v.text for v in section.verdicts if v.outcome == "contradicts"]
    assert any("LoRA (rank 64) better than PaCA (rank 64)" in text for text in texts)


def test_figure_2_judges_each_statement():
    section = section_of("fig2", "small")
    outcomes = section.numbers["claims"]
    assert outcomes["operations-lora-full"]["ours"]["value"] == pytest.approx(203 / 300)
    assert outcomes["time-paca-lora"]["ours"]["value"] == pytest.approx(0.8)
    # By way of PaCA, which both took turns with.
    assert outcomes["time-lora-full"]["ours"]["value"] == pytest.approx(1.0)
    assert outcomes["time-paca-backward-forward"]["ours"]["value"] == pytest.approx(1.25)
    page = make_markdown([section], "A report")
    assert "other processes kept up to 0.25 cores busy" in page


def test_a_rank_of_another_size_is_our_own():
    lines = lines_of("table2", "small")
    assert "| Llama 512x8 | PaCA | 8 | 1 | llama3-8b | 64 | 21 | 0.81 | 0.80 | -0.01 |" in lines


def test_figure_3_compares_batches_and_rates():
    section = section_of("fig3", "small")
    ratios = section.numbers["ratios"]
    assert "| DoRA | 9 | 20 |" in lines_of("fig3", "simulate")
    assert ratios["largest batch, measured"]["ours"] == pytest.approx(1.3)
    assert ratios["throughput at its best, measured"]["ours"] == pytest.approx(26 / 15)
    found = [(v.origin, v.outcome) for v in section.verdicts]
    assert found == [("simulated", "contradicts"), ("measured", "agrees"), ("measured", "agrees")]
    text = "PaCA's is 1.16 of LoRA's in the paper (A100), 1.73 [1.70, 1.77] here on Llama 256x4"
    assert text in section.verdicts[2].text


def sweep_with(spread):
    """Figure 3's results, the quartiles of each step so far from its median; None: left out."""
    results = made_up("fig3", "small")
    for point in results["bench"]["points"]:
        for number, sign in ((1, -1), (3, 1)):
            key = f"step_ms_quartile_{number}"
            point.pop(key)
            if spread is not None:
                point[key] = point["step_ms"] * (1 + sign * spread)
    return EXPERIMENTS["fig3"].section("small", results)


def test_figure_3_has_error_bars(monkeypatch):
    import matplotlib.axes

    seen = []
    original = matplotlib.axes.Axes.errorbar

    def errorbar(axes, xs, ys, **options):
        seen.append((options["label"], list(ys), options["yerr"]))
        return original(axes, xs, ys, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", errorbar)
    assert sweep_with(0.25).charts[1].svg.startswith("<svg")
    label, ys, (below, above) = seen[-1]
    assert (label, ys) == ("PaCA", [2.0, 26.0])
    # Steps of 500 ms, from 375 to 625: 1.6 to 2.67 times the batch in a second.
    assert below == pytest.approx([0.4, 5.2])
    assert above == pytest.approx([2 / 3, 26 / 3])


@pytest.mark.parametrize(
    ("spread", "outcome"), [(0.01, "agrees"), (0.4, "cannot_tell"), (None, "cannot_tell")]
)
def test_figure_3_knows_how_sure_its_rates_are(spread, outcome):
    section = sweep_with(spread)
    assert section.verdicts[-1].outcome == outcome
    note = "Only the median of each batch was recorded"
    assert any(note in table.note for table in section.tables) == (spread is None)


def test_tables_6_and_7():
    assert (
        "| ViT-B/16, random weights | PaCA | 8 | 1 | vit-b16 | - | 32 | 0.71 | 0.80 | +0.09 |"
        in lines_of("table6", "small")
    )
    lines = lines_of("table7", "full")
    assert "| efficientnetv2-l | PaCA | - | 93.7 | 90 | -3.70 |" in lines
    assert "| efficientnetv2-l | PaCA | - | 59 | 1 | -98.3% |" in lines
