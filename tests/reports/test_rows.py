"""Rows: what a number keeps, and the pivot."""

import math

import pytest

from pacatune.reports.rows import Row, number_text, table


def row(method="paca", value=2.0, **more):
    return Row(what=more.pop("what", "step"), method=method, value=value, **more)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.7349, "ms", "5.735"),
        (12345.6, "ms", "12,346"),
        (9999.6, "ms", "10,000"),
        (0.00213, "s", "0.00213"),
        (1536, "bytes", "1.5 KiB"),
        (1023, "bytes", "1023 B"),
        (-(2.0**20), "bytes", "-1.0 MiB"),
        (1024, "bytes", "1.0 KiB"),
        (3.0 * 2**50, "bytes", "3072.0 TiB"),
        (1234567, "", "1,234,567"),
        (0.123456, "", "0.1235"),
        (81.5, "%", "81.50"),
        (0.9996, "ratio", "1.000"),
    ],
)
def test_numbers(value, unit, text):
    assert number_text(value, unit) == text


def test_a_number_shows_its_interval():
    assert row(low=1.5, high=2.5, unit="ms").text() == "2 (1.5 to 2.5)"
    assert row(low=2.0, high=2.0).text() == "2"
    with pytest.raises(ValueError, match="interval has two ends"):
        row(low=1.0)
    with pytest.raises(ValueError, match="is empty"):
        row(low=2.0, high=1.0)


def test_shares_keep_what_is_known_of_their_spread():
    ours, other = row(low=1.0, high=3.0), row("lora", 4.0, low=2.0, high=8.0)
    share = ours.over(other)
    assert (share.method, share.unit) == ("paca / lora", "ratio")
    assert (share.value, share.low, share.high) == (0.5, 1 / 8, 3 / 2)
    exact = row("lora", 4.0, origin="counted")
    assert (ours.over(exact).low, ours.over(exact).high) == (0.25, 0.75)
    alone = ours.over(row("lora", 4.0))  # one run: nothing says how sure it is
    assert alone.low is None
    assert alone.high is None
    with pytest.raises(ZeroDivisionError, match="of lora is 0"):
        ours.over(row("lora", 0.0))


def test_differences_are_taken_one_by_one_where_they_can():
    ours = row(value=2.0, each={"0": 1.0, "1": 2.0, "2": 3.0}, low=0.0, high=4.0)
    other = row("lora", 1.0, each={"2": 2.0, "1": 1.0, "0": 0.0}, low=-1.0, high=3.0)
    paired = ours.minus(other)
    assert (paired.value, paired.low, paired.high) == (1.0, 1.0, 1.0)
    assert paired.each == {"0": 1.0, "1": 1.0, "2": 1.0}
    two = row(value=2.5, each={"0": 1.0, "1": 4.0}).minus(
        row("lora", 1.0, each={"0": 0.0, "1": 2.0})
    )
    assert (two.value, two.high) == pytest.approx((1.5, 1.5 + 12.71 * 0.5))
    seeds = {"0": 0.0, "1": 1.0, "3": 2.0}  # as many, but not the same
    unpaired = ours.minus(row("lora", 1.0, each=seeds, low=-1.0, high=3.0))
    assert (unpaired.low, unpaired.high, unpaired.each) == (-3.0, 5.0, {})
    assert ours.minus(row("lora", 1.0)).low is None


def test_the_pivot():
    rows = [
        row("lora", 4.0, unit="ms", model="small"),
        row("lora", 8, unit="bytes", what="kept", model="small"),
        row("paca", 2.0, unit="ms", low=1.5, high=2.5, model="small", note="Twice."),
        row("paca", 3, what="kept", model="large", unit="bytes", note="Twice."),
    ]
    found = table(rows, ("model", "method"), ("what",))
    assert found.markdown() == [
        "| model | method | step, ms | kept |",
        "|---|---|--:|--:|",
        "| small | lora | 4 | 8 B |",
        "| small | paca | 2 (1.5 to 2.5) | - |",
        "| large | paca | - | 3 B |",
    ]
    assert found.notes == ["Twice."]
    assert found.plain()[:3] == [
        "model  method        step, ms  kept",
        "small  lora                 4   8 B",
        "small  paca    2 (1.5 to 2.5)     -",
    ]
    with pytest.raises(ValueError, match="two numbers stand for small, step"):
        table(rows, ("model",), ("what",))
    # Origins stand side by side.
    rows = [row(value=22.0, unit="%", origin="paper"), row(value=math.pi, unit="%")]
    found = table(rows, ("method",), ("what", "origin"))
    assert found.markdown()[0] == "| method | step, paper, % | step, measured, % |"
    assert found.cells == [["paca", "22.00", "3.14"]]
