"""Statements of the text: exact where counted, on the right side of 1 where measured elsewhere."""

from dataclasses import replace

import pytest

from pacatune.experiments.reproduce.experiment import Measured
from pacatune.experiments.reproduce.verdicts import claims_table, judge_claim
from pacatune.paper.fig2 import CLAIMS

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
    slower = replace(FASTER, ratio=1.33)
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
