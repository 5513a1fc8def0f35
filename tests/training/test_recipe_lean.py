"""Lean activations in a run."""

import pytest

from pacatune.training import sft as models
from pacatune.training import train


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_lean_or_not_gives_equal_losses_and_keeps_less(make_config, console, tmp_path, method):
    reports = {}
    for mode in ("require", "off"):
        output = {"output_dir": str(tmp_path / mode)}
        config = make_config(method, lean=mode, training=output)
        reports[mode] = train(config, console=console)
    lean, plain = reports["require"], reports["off"]
    assert [loss for _, loss in lean.train_losses] == pytest.approx(
        [loss for _, loss in plain.train_losses], abs=1e-4
    )
    assert lean.saved_activation_bytes < 0.85 * plain.saved_activation_bytes
    assert plain.lean is None
    assert {kind: len(names) for kind, names in lean.lean["made"].items()} == {
        "attention": 2,
        "gated_mlp": 2,
        "norm": 5,
    }
    # TRL computes the loss, in chunks as well.
    assert lean.lean["left"] == {}
    assert dict(lean.table())["lean activations"] == "2 x attention, 2 x gated_mlp, 5 x norm"
    assert dict(plain.table())["lean activations"] == "off"
    assert "lean: 2 x attention" in console.file.getvalue()


def test_what_cannot_be_lean_is_said_once_or_refused(make_config, console):
    eager = {"attn_implementation": "eager"}
    report = train(make_config(model=eager), console=console)
    ((reason, names),) = report.lean["left"].items()
    assert reason.startswith("eager attention keeps the scores of all pairs of tokens")
    assert len(names) == 2
    text = console.file.getvalue()
    assert text.count("eager attention keeps") == 2  # when it is made, and in the table at the end
    assert "self_attn and 1 more: eager attention" in text


def test_required_but_impossible_is_found_before_the_weights_are_loaded(
    make_config, console, monkeypatch
):
    monkeypatch.setattr(models, "load_model", lambda config: pytest.fail("loaded"))
    config = make_config(model={"attn_implementation": "eager"}, lean="require")
    with pytest.raises(ValueError, match="this model cannot be all lean, which 'require' asks for"):
        train(config, console=console)
