"""Adapters between PEFT's own PaCA and ours: a stand-in for PEFT 0.22, in a process of its own."""

import contextlib
import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from pacatune import PacaConfig
from pacatune.adapters.folder import read_config
from pacatune.adapters.inspect import inspect_adapter
from tests.forks import run_cases
from tests.releases import needs
from tests.tuner.interchange import PEFT_WRITES, build, outputs, randomise

# The stand-in for a newer PEFT is made from this one.
pytestmark = needs("peft", "0.21")

NEWER_PEFT = """
from tests.tuner import peft_paca, interchange
peft_paca.install()
"""
READ_BY_PEFT = {
    "linear": {},
    "seed": {"random_seed": -5},
    "no seed": {"random_seed": None},
    "alpha": {"paca_alpha": -2.5},
    "columns": {"selection": "weight_norm"},
    "alpha over sqrt(r)": {"use_rslora": True, "paca_alpha": 5},
    "head": {"modules_to_save": ["head"]},
}
# What PEFT's would take for something else, or not at all.
NEEDS_OURS = {
    "TransformerEncoderLayer": {"target_modules": ["linear1"]},
    "a forward of its own": {"target_modules": ["scaled"]},
    "Conv1D": {"target_modules": ["conv1d"]},
    "Conv1d": {"target_modules": ["conv"]},
    "Embedding": {"target_modules": ["embed"]},
    "alpha_pattern": {"alpha_pattern": {"layers.1": 30}},
    "rank_pattern": {"rank_pattern": {"layers.1": 2}},
    "tokens": {"trainable_token_indices": {"embed": [1, 2]}},
}


def make(folder, options):
    config = PacaConfig(**{"r": 3, "target_modules": ["layers.0", "layers.1"], **options})
    model = get_peft_model(build(), config)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
    model.save_pretrained(folder)
    torch.save(outputs(model), folder / "outputs.pt")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What PEFT's own PaCA makes of our adapters, and the folder of those that it wrote."""
    folder = tmp_path_factory.mktemp("interchange")
    cases = {}
    for name, options in {**READ_BY_PEFT, **NEEDS_OURS}.items():
        make(folder / name, options)
        cases[name] = f"interchange.read({str(folder / name)!r})"
    (folder / "theirs").mkdir()
    writes = f"interchange.write({str(folder / 'theirs')!r})"
    ours_later = OURS_LATER.format(folder=str(folder))
    cases |= {"write": writes, "ours later": ours_later, "their class": THEIR_CLASS}
    cases = {name: f"from tests.tuner import interchange\n{code}" for name, code in cases.items()}
    return folder, run_cases(NEWER_PEFT, cases)


OURS_LATER = """
import copy, torch, peft
from peft import PeftModel, get_peft_model, inject_adapter_in_model
folder = {folder!r}
model = get_peft_model(interchange.build(), peft.PacaConfig(r=3, target_modules=["layers.0"]))
interchange.randomise(model)
alone = interchange.outputs(model)
import pacatune

model.save_pretrained(folder + "/saved later")
loaded = PeftModel.from_pretrained(interchange.build(), folder + "/saved later")
assert type(loaded.base_model) is pacatune.PacaModel
assert torch.allclose(interchange.outputs(loaded), alone, atol=1e-6)

model.load_adapter(folder + "/linear", "second")
model.set_adapter("second")
expected = torch.load(folder + "/linear/outputs.pt")
assert torch.allclose(interchange.outputs(model), expected, atol=1e-6)
model.save_pretrained(folder + "/both")
again = PeftModel.from_pretrained(interchange.build(), folder + "/both/second")
assert torch.allclose(interchange.outputs(again), expected, atol=1e-6)

for step in (
    lambda: model.load_adapter(folder + "/alpha_pattern", "third"),
    lambda: model.add_adapter("third", pacatune.PacaConfig(r=3, selection="weight_norm")),
    lambda: inject_adapter_in_model(
        pacatune.PacaConfig(r=3, target_modules=["layers.0"]), model.base_model.model, "third"
    ),
):
    try:
        step()
    except (ValueError, TypeError) as error:
        print(error)
"""

THEIR_CLASS = """
from peft import PacaConfig, get_peft_model
import pacatune, torch
config = PacaConfig(r=3, target_modules=["layers.0"])  # no seed, PEFT's default
torch.manual_seed(5)
model = get_peft_model(interchange.build(), config)
print(type(model.base_model).__module__, type(model.peft_config["default"].random_seed).__name__)
"""


@pytest.mark.parametrize("name", READ_BY_PEFT)
def test_peft_reads_what_has_nothing_of_its_own(answers, name):
    folder, said = answers
    assert said[name] == "right"
    assert config_of(folder / name)["peft_type"] == "PACA"


@pytest.mark.parametrize("name", NEEDS_OURS)
def test_peft_refuses_what_it_would_get_wrong_and_ours_reads_it(answers, name):
    """Whichever type the file says."""
    folder, said = answers[0] / name, answers[1]
    assert said[name] == "KeyError: 'PACATUNE'"
    path, expected = folder / "adapter_config.json", torch.load(folder / "outputs.pt")
    for kind in ("PACATUNE", "PACA"):
        path.write_text(json.dumps({**config_of(folder), "peft_type": kind}))
        model = PeftModel.from_pretrained(build(), folder)
        assert torch.allclose(outputs(model), expected, atol=1e-6)
        assert read_config(path).needs_pacatune()


IDLE = r"`layers_to_transform` \(\[1\]\) has no effect"


@pytest.mark.parametrize("name", PEFT_WRITES)
@pytest.mark.filterwarnings("ignore:`layers_to_transform` .* has no effect:UserWarning")
def test_ours_reads_what_peft_writes(answers, name, tmp_path):
    folder = answers[0] / "theirs" / name
    written = config_of(folder)
    assert "selection" not in written
    expected = torch.load(folder / "outputs.pt")
    is_idle = name == "regex and layers"
    warned = pytest.warns(UserWarning, match=IDLE) if is_idle else contextlib.nullcontext()
    with warned:
        model = PeftModel.from_pretrained(build(), folder)
    assert torch.allclose(outputs(model), expected, atol=1e-6)
    report = inspect_adapter(folder)
    assert report.random_seed == written["random_seed"]
    assert len(report.modules) == (1 if name == "excluded" else 2)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.allclose(outputs(again), expected, atol=1e-6)
    config = model.peft_config["default"]
    if name == "default":  # nothing but the file's indices says which columns
        assert config.random_seed is None
        assert config.columns == {one.name: one.columns for one in report.modules}
    elif "seed" in name:  # the same rule, for any integer
        assert config.random_seed == written["random_seed"]
        assert config.columns is None
    model.add_adapter("other", config)
    for layer in model.base_model.model.layers:
        if hasattr(layer, "paca_indices"):
            assert torch.equal(layer.paca_indices["other"], layer.paca_indices["default"])


def test_a_model_of_pefts_own_takes_and_saves_plain_adapters_and_refuses_others(answers):
    lines = answers[1]["ours later"].splitlines()
    assert len(lines) == 3, answers[1]["ours later"]
    assert lines[0].startswith("Adapter 'third' needs pacatune (`alpha_pattern`), but this model")
    assert lines[1].startswith("Adapter 'third' needs pacatune (`selection`), but this model was")
    assert lines[2].startswith("Target module 'layers.0' is adapted already, by tests.tuner.peft_p")
    assert answers[1]["their class"] == "pacatune.tuner.model int"  # taken without a seed


def test_a_drawn_seed_is_recorded_and_follows_torchs_generator():
    def adapt(config, seed):
        base = build()
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        columns = model.base_model.model.layers[0].paca_indices["default"]
        return model.peft_config["default"], columns.tolist()

    config = PacaConfig(r=3, target_modules=["layers.0"], random_seed=None)
    (one, columns), (two, _), (three, same) = (adapt(config, seed) for seed in (3, 0, 3))
    assert config.random_seed is None
    assert one.random_seed == three.random_seed != two.random_seed
    assert adapt(one, seed=5)[1] == columns == same
