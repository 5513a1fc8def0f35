"""The private methods of transformers and TRL that ours replace: an upstream rename fails here."""

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
from trl import SFTTrainer

from pacatune.training import TASKS, train
from tests.training.runs import QUIET

# Ours alone; everything else that begins with _ in a trainer of ours replaces what upstream calls.
OWN = {
    *("_diverged", "_trust_weights", "_launched_by", "_load_plain_model", "_name_best_checkpoint"),
    "_gather_trained_head",
}


def replaced():
    """Yield each private method of a trainer of ours, with the trainers that it is put before."""
    found = {}
    for spec in TASKS.values():
        trainer = resolve_name(spec.trainer)
        for kind in trainer.__mro__:
            if kind.__module__.startswith("pacatune."):
                found.setdefault(kind, set()).add(trainer)
    for kind, upstream in found.items():
        for name, value in vars(kind).items():
            is_method = inspect.isfunction(value) or isinstance(value, property)
            if is_method and name.startswith("_") and not name.startswith("__") and name not in OWN:
                yield pytest.param(name, upstream, id=f"{kind.__name__}{name}")


@pytest.mark.parametrize(("name", "upstream"), [*replaced()])
def test_what_is_replaced_is_still_called(name, upstream):
    bases = {kind for theirs in upstream for kind in theirs.__mro__}
    bases = [kind for kind in bases if kind.__module__.startswith(("trl.", "transformers."))]
    assert any(name in vars(kind) for kind in bases), "it is not upstream any more"
    assert any(f"self.{name}" in inspect.getsource(kind) for kind in bases), "nothing calls it"


def test_each_stands_in_the_architecture_with_its_reason():
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    (rows,) = re.findall(r"why no hook does it \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    said = [
        name for row in rows.splitlines() for name in re.findall(r"`(_\w+)`", row.split("|")[1])
    ]
    assert sorted(said) == sorted({one.values[0] for one in replaced()})


def test_nobody_is_told_of_a_run(make_config, monkeypatch):
    """TRL asks for it in each trainer; ours does nothing."""
    calls = []
    monkeypatch.setattr(SFTTrainer, "_send_telemetry", lambda self: calls.append("told"))
    monkeypatch.setattr(SFTTrainer, "create_model_card", lambda *args, **kw: calls.append("card"))
    train(make_config(training={"max_steps": 1, "eval_strategy": "no"}), console=QUIET)
    assert calls == []
