"""The rule of the quality study's plan."""

import json

import pytest

from benchmarks.quality_verdict import baseline, main, report, winners
from pacatune.study.statistics import mean_of, std_of

PACA = [0.50, 0.52, 0.51]  # spread 0.01
GOOD, LIKE, BAD = [0.60, 0.62, 0.61], [0.505, 0.515, 0.51], [0.40, 0.42, 0.41]


def study(arms, validation=None, *, finished=True):
    """What study.json holds; arms: name -> a value for each seed."""
    validation = {"lora": 0.5, "rslora": 0.4} | (validation or {})
    return {
        "finished": finished,
        "reference": "paca",
        "higher_is_better": True,
        "metric": "accuracy",
        "arms": {
            name: {
                "values": {str(seed): value for seed, value in enumerate(values)},
                "mean": mean_of(values),
                "std": std_of(values),
                "rates": {"0.001": validation.get(name, 0.5), "0.002": None},
            }
            for name, values in {"paca": PACA, **arms}.items()
        },
    }


def test_lora_is_the_better_one_on_validation_data():
    arms = {"lora": BAD, "rslora": GOOD}
    assert baseline(study(arms)) == "lora"
    assert baseline(study(arms, {"rslora": 0.6})) == "rslora"
    assert baseline(study({"groups4": GOOD})) is None


@pytest.mark.parametrize(
    ("third", "lora", "expected"),
    [
        (LIKE, LIKE, ["groups4"]),
        (BAD, LIKE, []),  # worse on one model
        (GOOD, LIKE, ["groups4"]),
        (GOOD, GOOD, []),  # as good as LoRA
    ],
)
def test_the_winner_beats_both_on_two_models_and_loses_on_none(third, lora, expected):
    studies = {
        name: study({"lora": lora, "groups4": values, "normalized": LIKE, "full": GOOD})
        for name, values in (("a", GOOD), ("b", GOOD), ("c", third))
    }
    assert winners(studies) == expected
    assert winners({"a": studies["a"]}) == []


def test_report(tmp_path, capsys):
    studies = {
        "smollm2": study({"lora": LIKE, "groups4": GOOD}),
        "minilm": study({"lora": BAD, "output": BAD}, finished=False),
    }
    assert "| `groups4` | better / better |  |" in report(studies)
    assert "| `paca` | - / - | - / better |" in report(studies)
    assert "| `output` |  | worse / - |" in report(studies)
    for name, values in studies.items():
        (tmp_path / f"quality-{name}").mkdir()
        (tmp_path / f"quality-{name}" / "study.json").write_text(json.dumps(values))
    main([str(tmp_path / f"quality-{name}") for name in studies])
    shown = capsys.readouterr().out
    assert "Better than both on 2 models at least and worse on none: none." in shown
    assert "Unfinished: minilm; nothing is decided yet." in shown
