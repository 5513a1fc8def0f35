"""The rules of the study of row groups, on results that are made up."""

import pytest

from benchmarks import verdict


def study(**arms):
    """A study of two seeds, whose reference has a standard deviation of 0.01."""
    arms = {"paca": (0.5, 0.5), "lora": (0.5, 0.5), "rslora": (0.4, 0.4), **arms}
    made = {
        name: {
            "method": "lora" if "lora" in name else "paca",
            "values": {str(seed): value for seed, value in enumerate(values)},
            "rates": {"0.1": max(values), "0.2": None},
            "std": 0.01,
        }
        for name, values in arms.items()
    }
    return {"higher_is_better": True, "reference": "paca", "arms": made}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.52, 0.53), "better"),
        ((0.60, 0.49), ""),  # not for every seed
        ((0.505, 0.505), ""),  # within the spread
        ((0.48, 0.48), "worse"),
        ((0.60, 0.30), "worse"),
    ],
)
def test_verdicts(values, said):
    made = study(groups16=values)
    assert verdict.best_lora(made) == "lora"
    assert verdict.judged(made, "groups16", "paca") == said


def test_less_is_better_of_a_loss():
    made = study(groups16=(0.48, 0.48)) | {"higher_is_better": False}
    assert verdict.judged(made, "groups16", "paca") == "better"
    assert verdict.best_lora(made) == "rslora"


def test_a_default_is_better_on_two_models_and_worse_on_none():
    better, same, worse = (0.6, 0.6), (0.5, 0.5), (0.4, 0.4)

    def studies(minilm, problems, words, dinov2):
        values = (minilm, problems, words, dinov2)
        names = [name for model in verdict.MODELS.values() for name in model]
        return {n: study(groups16=v) for n, v in zip(names, values, strict=True)}

    assert verdict.candidates(studies(better, better, same, same)) == ["groups16"]
    assert verdict.candidates(studies(better, same, same, same)) == []
    assert verdict.candidates(studies(same, better, better, same)) == []  # one model
    assert verdict.candidates(studies(better, better, same, worse)) == []
    assert verdict.candidates(studies(better, better, worse, better)) == []
    shown = verdict.table(studies(better, same, same, worse))
    (row,) = [cells for cells in shown.cells if cells[0] == "groups16"]
    assert row == ["groups16", "better", "better", "", "", "worse", "worse"]
