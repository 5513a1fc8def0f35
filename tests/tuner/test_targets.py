"""What cannot be adapted as a configuration says: the error says why, and the base is left alone
(R5). test_config.py has what is wrong with a configuration by itself.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from pacatune import PacaConfig
from tests.conftest import build_model
from tests.tuner import moe

EXPERTS = {"target_parameters": moe.BOTH, "target_modules": []}


def targets(*names: str) -> dict[str, list[str]]:
    return {"target_modules": list(names)}


Q = targets("q_proj")


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (8,))


class OwnExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


def llama() -> nn.Module:
    return build_model(64)


def mixtral(change=lambda experts: None) -> nn.Module:
    base = moe.build("mixtral")
    change(base.model.layers[0].mlp.experts)
    return base


def parametrised() -> nn.Module:
    base = llama()
    nn.utils.parametrizations.weight_norm(base.model.layers[1].self_attn.q_proj)
    return base


def pack(experts: nn.Module) -> None:
    packed = torch.zeros_like(experts.down_proj, dtype=torch.uint8)
    experts.down_proj = nn.Parameter(packed, requires_grad=False)


def share_out(experts: nn.Module) -> None:
    experts._is_expert_parallel = True


def one(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"one": layer})


BASES = {
    "llama": llama,
    "parametrised": parametrised,
    "one of two convolutions": lambda: nn.ModuleDict(
        {"one": nn.Conv2d(8, 8, 3, groups=8), "two": nn.Conv2d(4, 8, 3)}
    ),
    "transposed convolution": lambda: one(nn.ConvTranspose2d(3, 4, 3)),
    "weight_norm": lambda: one(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))),
    "attention": lambda: one(nn.MultiheadAttention(12, 4)),
    "max_norm": lambda: one(nn.Embedding(11, 8, max_norm=1.0)),
    "normed embedding": lambda: one(NormedEmbedding(11, 8)),
    "experts": mixtral,
    "experts with biases": lambda: moe.build("gpt_oss"),
    "own experts": lambda: nn.ModuleDict({"experts": OwnExperts()}),
    "packed experts": lambda: mixtral(pack),
    "shared experts": lambda: mixtral(share_out),
}
VALUES = [
    ("llama", targets("q_proj", "query"), r"\['query'\] match no module.*q_proj \(2\)"),
    ("llama", targets("query"), r"not found in the base model.*q_proj \(2\)"),
    ("llama", Q | {"r": 33}, r"`r` \(33\) must be in \[1, in_features=32\] for 'model.layers.0"),
    ("parametrised", Q, r"layers.1.self_attn.q_proj.*parametrised weight"),
    ("weight_norm", {}, r"'one' has a parametrised weight"),
    ("max_norm", {}, r"'one' has `max_norm` \(1.0\): it changes its weight"),
    (
        "experts",
        {"target_parameters": ["experts.up"]},
        r"match no parameter of Mixtral.* these .*: experts.down_proj \(2\), experts.gate_up",
    ),
    (
        "experts",
        {"target_parameters": ["q_proj.weight"]},
        r"has shape \(16, 16\); it must be the three-dimensional .* has these expert parameters",
    ),
    ("experts", EXPERTS | {"layers_to_transform": [7]}, "every .* is left out by `exclude_mod"),
    ("experts with biases", EXPERTS | {"bias": "all"}, r"`bias` \('all'\) must be 'none' with"),
]
TYPES = [
    ("attention", {}, r"'one' is not supported: torch.nn.MultiheadAttention reads its weights"),
    ("attention", targets("out_proj"), r"'one.out_proj' is not supported: torch.nn.MultiheadAtt"),
    ("llama", targets("norm"), r"norm.*LlamaRMSNorm.* PaCA adapts torch.nn.Linear, .*Embedding"),
    ("transposed convolution", {}, r"ConvTranspose2d\) is not supported.*torch.nn.Conv1d"),
    ("normed embedding", {}, r"'one' \(NormedEmbedding\) is not supported: it has a forward of"),
    (
        "experts",
        {"target_parameters": "up"},
        r"`target_parameters` \('up'\) must be a list of names",
    ),
    ("own experts", EXPERTS, r"\(OwnExperts\) is not supported.*parameters: none"),
    ("packed experts", EXPERTS, "is torch.uint8 Parameter; quantised and sharded experts"),
    ("shared experts", EXPERTS, "quantised and sharded experts are not supported"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("error", "name", "options", "message"),
    [*((ValueError, *row) for row in VALUES), *((TypeError, *row) for row in TYPES)],
)
def test_bases(error: type[Exception], name: str, options: dict, message: str) -> None:
    base = BASES[name]()
    before = [type(module) for module in base.modules()]
    with pytest.raises(error, match=message):
        get_peft_model(base, PacaConfig(**{"r": 2, "target_modules": ["one"], **options}))
    assert [type(module) for module in base.modules()] == before


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, which has its doubts too
def test_other_methods() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["one"]), one(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"'one' is adapted already, by peft.tuners.lora"):
        inject_adapter_in_model(PacaConfig(r=2, target_modules=["one"]), model)
