"""What is read from a tensor parallel plan; tests/distributed trains on real ones."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pacatune import PacaConfig, installation
from pacatune.tuner.model import PacaModel
from pacatune.tuner.targets import check_targets
from pacatune.tuner.tensor_parallel import refuse_copies, split_of
from tests.releases import needs

pytestmark = needs("transformers", "5.17")


class Planned(nn.Module):
    """As transformers leaves a model: the plan, the mesh, and the number of processes."""

    def __init__(self, tp_plan, tp_size=2):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8)})])
        self.tp_plan, self._tp_size = tp_plan, tp_size
        self._device_mesh = SimpleNamespace(ndim=1)


def layer(model):
    return model.layers[0]["q"]


def test_model_without_a_plan():
    model = Planned({"layers.*.q": "colwise"}, tp_size=1)
    assert split_of(model, "layers.0.q", layer(model)) is None
    refuse_copies(model, ["q"])
    assert split_of(nn.Sequential(layer(model)), "0", layer(model)) is None
    assert split_of(Planned({"layers.*.q": "rowwise"}), "layers.0.o", nn.Conv1d(2, 2, 1)) is None


@pytest.mark.parametrize("plan", [{}, {"layers.*.q": "replicate"}, {"layers.*": "local_params"}])
def test_whole_layers_of_a_planned_model(plan):
    model = Planned(plan)
    split = split_of(model, "layers.0.q", layer(model))
    assert split.style.dim is None
    assert split.mesh is model._device_mesh
    assert split.data_mesh is None
    refuse_copies(model, ["q"])


class Packed(nn.Linear):
    """Has a forward of its own, as quantised layers do."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("plan", "module", "message"),
    [
        ({"layers.*.q": "mla_kv_a_proj"}, None, "style is 'mla_kv_a_proj' and its module a Linear"),
        ({"layers.*": "all_reduce"}, None, "it is inside 'layers.0', whose style is 'all_reduce'"),
        # A plain weight under such a style is a part that does not say so: of older releases.
        ({"layers.*.q": "colwise"}, None, "its style is 'colwise'"),
        ({"layers.*.q": "rowwise"}, None, "its style is 'rowwise'"),
        ({"layers.*.q": "colwise"}, Packed(8, 8), "style is 'colwise' and its module a Packed"),
        ({"layers.*.q": "embedding_rowwise"}, nn.Embedding(8, 4), "and its module a Embedding"),
    ],
)
def test_unsupported_styles(plan, module, message):
    model = Planned(plan)
    model.layers[0]["q"] = module or layer(model)
    config = PacaConfig(r=2, target_modules=["q"])
    with pytest.raises(ValueError, match=f"'layers.0.q' shares its work .* {message}"):
        check_targets(PacaModel, config, model)


def test_marks_of_older_releases(monkeypatch):
    module = nn.Linear(2, 2)
    module._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"split by something else than a plan of transformers"):
        split_of(nn.Sequential(module), "0", module)
    monkeypatch.setattr(installation, "version", lambda package: "5.16.0")
    model = Planned({"layers.*.q": "colwise"})
    with pytest.raises(ValueError, match=r"tensor parallelism needs transformers 5.17"):
        split_of(model, "layers.0.q", layer(model))


@pytest.mark.parametrize(("name", "inside"), [("q", "layers.0.q"), ("layers", "layers")])
def test_copies_of_split_modules(name, inside):
    model = Planned({"layers.*.q": "colwise"})
    with pytest.raises(ValueError, match=rf"`modules_to_save` .*'{inside}' .*style 'colwise'"):
        refuse_copies(model, [name])


def test_forward_that_somebody_has_wrapped():
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    model = Planned({"layers.*.q": "replicate"})
    TensorParallelLayer().install_forward(layer(model), None)
    hook = layer(model).forward
    assert split_of(model, "layers.0.q", layer(model)).hook is hook
    layer(model).forward = functools.wraps(hook)(lambda x: 2 * hook(x))
    assert split_of(model, "layers.0.q", layer(model)).hook is None
    layer(model).forward = functools.update_wrapper(functools.partial(hook), hook)
    assert split_of(model, "layers.0.q", layer(model)).hook is None
    assert layer(model)(torch.ones(1, 8)).shape == (1, 8)
