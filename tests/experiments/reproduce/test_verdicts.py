"""The rule by which a result contradicts the paper."""

import dataclasses

import pytest

from pacatune.experiments.reproduce.experiment import Measured
from pacatune.experiments.reproduce.verdicts import judge, share


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
