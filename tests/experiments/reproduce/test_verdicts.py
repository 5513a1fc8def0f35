"""The rule by which a result contradicts the paper."""

import dataclasses

import pytest

from pacatune.experiments.reproduce.experiment import Measured
from pacatune.experiments.reproduce.verdicts import claims_table, judge, judge_claim, share
from pacatune.paper.fig2 import CLAIMS


def number(value, spread=0.0):
    return Measured(value=value, low=value - spread, high=value + spread, origin="measured")


def only(table, column, **values):
    ours = {f"small-{method}-r8": n for method, n in values.items()}
    (verdict,) = judge(table, column, ours)
    return verdict


def test_the_same_order_agrees(table, same):
    verdict = only(table, same, lora=number(21), paca=number(18, 0.5))
    assert verdict.outcome == "agrees"
    assert verdict.text == (
        "our memory, small: the paper has LoRA (rank 8) above PaCA (rank 8) (20 and 16 GB); "
        "here LoRA (rank 8) above PaCA (rank 8) (21 and 18 [17.5, 18.5] GB)"
    )


def test_the_opposite_order_contradicts(table, same):
    assert only(table, same, lora=number(18), paca=number(21)).outcome == "contradicts"


def test_an_order_is_open_where_lines_are_alike_here(table, same):
    """20 and 16 GB for the paper, and intervals that would show 4."""
    assert only(table, same, lora=number(18, 1), paca=number(19, 1)).outcome == "open"
    assert only(table, same, lora=number(18), paca=number(18.4)).outcome == "open"  # margin 0.5


def test_intervals_wider_than_the_papers_difference_cannot_tell(table, same):
    assert only(table, same, lora=number(18, 3), paca=number(21, 3)).outcome == "cannot_tell"
    assert only(table, same, lora=number(20, 9), paca=number(16, 9)).outcome == "cannot_tell"
    # An order that is seen all the same counts.
    assert only(table, same, lora=number(40, 9), paca=number(16, 9)).outcome == "agrees"


def test_an_order_where_the_paper_has_none_contradicts(table, scores):
    """50.0 and 50.5 are alike for the paper."""
    verdict = only(table, scores, lora=number(70, 0.5), dora=number(60, 0.5))
    assert verdict.outcome == "contradicts"
    assert "the paper has LoRA (rank 8) and DoRA (rank 8) alike" in verdict.text
    assert only(table, scores, lora=number(70, 0.5), dora=number(70.8, 0.1)).outcome == "agrees"


def test_lines_that_are_alike_agree_if_a_difference_would_have_been_seen(table, scores):
    """They once agreed however wide the intervals: 70 and 60, nine points up and down."""
    verdict = only(table, scores, lora=number(70, 9), dora=number(60, 9))
    assert verdict.outcome == "cannot_tell"
    assert "here on Tiny LoRA (rank 8) and DoRA (rank 8) not told apart (70 [61, 79]" in (
        verdict.text
    )
    assert only(table, scores, lora=number(70, 0.6), dora=number(70, 0.6)).outcome == "cannot_tell"
    assert only(table, scores, lora=number(70, 0.4), dora=number(70, 0.4)).outcome == "agrees"


def test_of_another_size_the_papers_difference_is_a_share(table, shares):
    """16 of 20 GB: a fifth."""
    assert only(table, shares, lora=number(1000, 90), paca=number(990, 90)).outcome == "open"
    assert only(table, shares, lora=number(1000, 110), paca=number(990, 110)).outcome == (
        "cannot_tell"
    )


def test_a_scale_of_another_unit_has_the_margin_of_ours(table, scores):
    loss = dataclasses.replace(
        scores,
        quantity=dataclasses.replace(scores.quantity, unit="nats", margin=0.02),
        is_inverted=True,
    )
    lora, paca = number(3.00, 0.04), number(3.01, 0.04)
    assert only(table, loss, lora=lora, paca=paca).outcome == "cannot_tell"
    assert only(table, loss, lora=number(3.00, 0.005), paca=number(3.01, 0.005)).outcome == "open"


def test_verdicts_name_our_own_model_and_rank(table, shares):
    verdict = only(table, shares, lora=number(1000), paca=number(850))
    assert verdict.origin == "measured"
    assert verdict.text == (
        "measured memory: the paper has LoRA (rank 8) above PaCA (rank 8) (20 and 16 GB, small); "
        "here on Tiny LoRA (rank 4) above PaCA (rank 4) (1000 and 850 MB)"
    )


def test_margins_of_other_sizes_are_shares(table, shares):
    assert only(table, shares, lora=number(1000), paca=number(990)).outcome == "open"
    assert only(table, shares, lora=number(1000), paca=number(970)).outcome == "agrees"


def test_only_lines_of_one_model_are_compared(table, same):
    ours = {"small-lora-r8": number(1), "large-lora-r8": number(9)}
    assert list(judge(table, same, ours)) == []


def test_every_pair_is_judged(table, same):
    ours = {f"small-{m}-r8": number(n) for m, n in (("lora", 20), ("dora", 30))}
    ours["small-paca-r8"] = number(25)
    assert [v.outcome for v in judge(table, same, ours)] == ["agrees", "contradicts", "agrees"]


def test_untrained_models_are_compared_on_the_papers_task_only(table, scores):
    ours = {"small-none": number(20), "small-lora-r8": number(80)}
    assert list(judge(table, scores, ours)) == []
    (verdict,) = judge(table, dataclasses.replace(scores, model=""), ours)
    assert verdict.outcome == "agrees"


def test_shares_and_points(same, scores):
    assert share(same, 15, 20) == 0.75
    assert share(scores, 53, 50) == pytest.approx(3)


# Statements of the text: exact where counted, on the right side of 1 where measured elsewhere.

FASTER = next(claim for claim in CLAIMS if claim.key == "time-paca-lora")  # 0.81
ALIKE = next(claim for claim in CLAIMS if claim.key == "time-lora-full")  # 0.994
COUNTED = next(claim for claim in CLAIMS if claim.key == "operations-lora-full")  # 0.67


def outcome(claim, low, high, origin="measured"):
    ours = Measured(value=(low + high) / 2, low=low, high=high, origin=origin)
    return judge_claim(claim, ours).outcome


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 0.6, "agrees"),
        (0.9, 0.99, "agrees"),
        (0.9, 1.1, "open"),
        (0.7, 1.1, "cannot_tell"),  # wider than the paper's distance from 1, 0.19
        (1.01, 1.2, "contradicts"),
    ],
)
def test_measured_shares_lie_on_the_same_side(low, high, expected):
    assert outcome(FASTER, low, high) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.98, 1.02, "agrees"),
        (0.96, 1.0, "open"),
        (0.9, 1.0, "cannot_tell"),  # wider than the margin, 0.03
        (0.8, 0.9, "contradicts"),
    ],
)
def test_shares_that_are_alike_stay_near_1(low, high, expected):
    assert outcome(ALIKE, low, high) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.675, "agrees"), (0.72, "contradicts")])
def test_counted_shares_are_met_within_the_margin(value, expected):
    assert outcome(COUNTED, value, value, "counted") == expected


def test_a_claim_above_1():
    slower = dataclasses.replace(FASTER, ratio=1.33)
    assert outcome(slower, 1.1, 1.2) == "agrees"
    assert outcome(slower, 0.8, 0.9) == "contradicts"


def test_table_has_both_numbers():
    ours = Measured(value=0.9, low=0.85, high=0.95, origin="measured")
    table = claims_table([(FASTER, ours)])
    assert table.rows == [
        [
            "time of PaCA's step / LoRA's step",
            "section 3.1",
            "0.81",
            "0.900 (0.850 to 0.950)",
            "+0.090",
        ]
    ]
    text = judge_claim(FASTER, ours).text
    assert "19% reduction" in text
    assert "is 0.81 in the paper, 0.900 [0.850, 0.950] here (measured)" in text
