"""What PEFT users do with a whole model, beyond PEFT's own tests (tests/conformance runs those).

test_every_kind.py holds what becomes of one layer.
"""

import copy
import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pacatune import PacaConfig
from pacatune.adapters.loading import hotswap_adapter
from pacatune.format.tensors import plain_name
from tests.releases import LOADS_ADAPTERS
from tests.tuner import nets
from tests.tuner.nets import evaluate, fill

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAME = "model.layers.0.self_attn.q_proj"
loads_adapters = pytest.mark.skipif(
    not LOADS_ADAPTERS, reason="transformers 5 needs PEFT >= 0.19 to load them"
)


@pytest.fixture(autouse=True)
def _peft_is_new_enough(monkeypatch):
    """Let transformers 5.24 add adapters with this PEFT: it asks for 0.22, and for nothing else."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.randint(0, 100, (3, 30), generator=torch.Generator().manual_seed(0))


def adapt(base, **options):
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return nets.adapt(base, **options)


def logits(model, ids, **kwargs):
    return evaluate(model, input_ids=ids, **kwargs).logits


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_own_state(base, folder):
    model = adapt(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name: f"{name}.default" for name in tensors if name.endswith("indices")}
    model.load_state_dict({names[name]: tensors[name] for name in names}, strict=False)


DOORS = {
    "PEFT": PeftModel.from_pretrained,
    "PEFT, on meta first": lambda base, folder: PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=True
    ),
    "load_adapter of PEFT": lambda base, folder: adapt(base).load_adapter(folder, "other"),
    "load_adapter of transformers": lambda base, folder: base.load_adapter(str(folder)),
    "from_pretrained of transformers": lambda base, folder: AutoModelForCausalLM.from_pretrained(
        folder
    ),
    "load_state_dict": load_own_state,
    "hotswap": lambda base, folder: hotswap_adapter(adapt(base), folder),
}


class TestFiles:
    @loads_adapters
    @pytest.mark.parametrize("options", [{}, {"selection": "weight_norm"}])
    def test_loads_by_every_door(self, base, ids, tmp_path, tiny_model_dir, options):
        """transformers loads tensors past PEFT: there the columns are noted by the first pass."""
        model = adapt(base, **options)
        want = logits(model, ids)
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, base_model_name_or_path=str(tiny_model_dir))
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), ids), want)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), want)
        plain = copy.deepcopy(base)
        plain.load_adapter(str(tmp_path))
        assert torch.equal(logits(plain, ids), want)
        assert plain.peft_config["default"].columns == model.peft_config["default"].columns
        two = adapt(base, random_seed=1)
        two.load_adapter(tmp_path, adapter_name="loaded")
        two.set_adapter("loaded")
        assert torch.equal(logits(two, ids), want)

    @loads_adapters
    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
    @pytest.mark.parametrize("ranks", [{}, {"v_proj": 3}])  # in files: type PACA, and PACATUNE
    def test_adapters_of_transformers(self, base, ids, tmp_path, ranks):
        plain = logits(base, ids)
        base.add_adapter(PacaConfig(r=4, target_modules=TARGETS, rank_pattern=ranks))
        fill(base)
        first = logits(base, ids)
        base.add_adapter(PacaConfig(r=2, target_modules=["up_proj"]), "other")
        fill(base, "other")
        assert base.active_adapters() == ["other"]
        assert len(base.get_adapter_state_dict()) == 2 * 2
        assert not torch.equal(logits(base, ids), first)
        base.set_adapter("default")
        assert torch.equal(logits(base, ids), first)
        base.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(logits(loaded, ids), first)
        base.disable_adapters()
        assert torch.equal(logits(base, ids), plain)
        base.enable_adapters()
        base.delete_adapter("other")
        assert torch.equal(logits(base, ids), first)
        base.delete_adapter("default")
        assert torch.equal(logits(base, ids), plain)

    def test_of_another_base_or_damaged(self, base, tmp_path):
        adapt(base).save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = load_file(path)
        renamed = {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}
        broken = {**tensors, f"base_model.model.{NAME}.paca_delta": torch.full((32, 4), torch.nan)}
        other_base = r"query.paca_.*no such adapted"
        for changed, message in ((renamed, other_base), (broken, "not finite")):
            save_file(changed, path)
            with pytest.raises(ValueError, match=message):
                PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

    @loads_adapters
    @pytest.mark.parametrize("door", DOORS)
    def test_columns_that_no_weight_has(self, base, tmp_path, tiny_model_dir, door):
        """Refused by every door, before anything computes with them; format/ has all kinds."""
        adapt(base).save_pretrained(tmp_path)
        edit_config(tmp_path, base_model_name_or_path=str(tiny_model_dir))
        path, name = tmp_path / "adapter_model.safetensors", f"base_model.model.{NAME}.paca_indices"
        tensors = load_file(path)
        tensors[name][-1] = 10**6
        save_file(tensors, path)
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(ValueError, match="1000000"):
            DOORS[door](base, tmp_path)
        after = {plain_name(name): tensor for name, tensor in base.state_dict().items()}
        assert all(torch.equal(after[name], before[name]) for name in before)


CALLS = {
    "sum": lambda model, ids, folder, *arguments: model.add_weighted_adapter(*arguments),
    "rows": lambda model, ids, folder, *names: model(input_ids=ids, adapter_names=[*names]),
    "swap": lambda model, ids, folder, name: hotswap_adapter(model, folder, name),
}


class TestSeveralAdapters:
    @pytest.fixture
    def model(self, base):
        model = adapt(base)
        config = PacaConfig(r=6, paca_alpha=3, target_modules=["q_proj", "up_proj"])
        model.add_adapter("b", config)
        fill(model, "b", seed=3)
        return model

    @pytest.mark.parametrize(
        ("call", "arguments", "state", "message"),
        [
            ("sum", (["default"], [1.0, 2.0], "sum"), None, r"`adapters` \(1\) and .*\(2\)"),
            ("sum", (["nobody"], [1.0], "sum"), None, r"\['nobody'\] do not exist"),
            ("sum", (["default"], [1.0], "default"), None, r"'default'\) is taken"),
            ("sum", (["default"], [1.0], "sum", "svd"), None, r"'svd'\) must be 'linear'"),
            ("rows", ("nobody", "b", "b"), None, r"non-existing adapter\(s\): nobody"),
            ("rows", ("default", "default"), None, "got 2 and 3 respectively"),
            ("rows", ("default",) * 3, "train", "training mode"),
            ("rows", ("default",) * 3, "merge_adapter", "unmerge_adapter"),
            ("swap", ("b",), None, r"do not adapt the same modules.*up_proj"),
            ("swap", ("nobody",), None, r"'nobody'\) is no adapter"),
            ("swap", ("default",), "merge_adapter", "is merged"),
        ],
    )
    def test_refused(self, model, base, ids, tmp_path, call, arguments, state, message):
        adapt(base).save_pretrained(tmp_path)
        getattr(model.eval(), state or "eval")()
        with pytest.raises(ValueError, match=message):
            CALLS[call](model, ids, tmp_path, *arguments)


def test_an_adapter_of_a_wider_base_is_not_swapped_in(tmp_path):
    """Its last column is the first that this base has not."""
    options = {"target_modules": ["0"], "r": 2}
    wider = nets.adapt(nn.Sequential(nn.Linear(8, 4)), selection={"0": [0, 7]}, **options)
    wider.save_pretrained(tmp_path)
    model = nets.adapt(nn.Sequential(nn.Linear(7, 4)), **options)
    with pytest.raises(ValueError, match=r"columns up to 7, but the base .* has 7 columns"):
        hotswap_adapter(model, tmp_path)
