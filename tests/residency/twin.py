"""One adapted layer of any kind, and all that is needed to say what it must do."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GptOssConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from pacatune import PacaConfig
from pacatune.ops.columns import Update
from pacatune.tuner.quantized import QuantizedLinear, dequantized
from tests.releases import has
from tests.tuner import nets
from tests.tuner.quantizers import quantise

IN, OUT = 12, 8
_NUM_EXPERTS = 3
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _route(layer: nn.Module, x: Tensor) -> Tensor:
    """Send token i to experts i and i + 1."""
    experts = torch.arange(len(x)).unsqueeze(1) + torch.arange(2)
    return layer(x, experts % _NUM_EXPERTS, torch.full_like(x[:, :2], 0.5))


@dataclass(frozen=True)
class Kind:
    """How to build a layer, and what N tokens are."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = lambda num_tokens: torch.randn(num_tokens, IN)
    call: Callable[[nn.Module, Tensor], Tensor] = _call
    parameter: str = "weight"
    """Name of the layer's parameter that is adapted."""
    target: str = "layer"
    """What `target_modules` says, or `target_parameters` if it has a dot."""
    channels: int | None = None
    """How many columns have an update of rank 3; None: each of three has its own."""


def _images(dims: int) -> Callable[[int], Tensor]:
    """Takes N, the positions in the first spatial dimension."""
    return lambda num: torch.randn(2, IN, num, *[4] * (dims - 1))


def _experts(experts: type, config: type) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": IN, "intermediate_size": OUT, "num_local_experts": _NUM_EXPERTS}
    return lambda: experts(config(**sizes, experts_implementation="eager"))


_OF_EXPERTS = {"call": _route, "parameter": "gate_up_proj", "target": "layer.gate_up_proj"}
# GptOss clips what gate_up_proj gives: its gradient has steps.
_OF_GPT_OSS = {"call": _route, "parameter": "down_proj", "target": "layer.down_proj"}
_WIDE = 64  # rows of whole blocks


def _quantised(method: str) -> Kind:
    return Kind(
        lambda: quantise(nn.Linear(_WIDE, OUT), method),
        inputs=lambda num_tokens: torch.randn(num_tokens, _WIDE),
    )


KINDS = {
    "Linear": Kind(lambda: nn.Linear(IN, OUT)),
    "Conv1D": Kind(lambda: Conv1D(OUT, IN)),
    "Conv1d": Kind(lambda: nn.Conv1d(IN, OUT, 3, 2), _images(1)),
    "Conv2d": Kind(lambda: nn.Conv2d(IN, OUT, 3), _images(2)),
    "Conv2d, groups": Kind(lambda: nn.Conv2d(IN, OUT, 3, groups=2), _images(2)),
    "Conv2d, depthwise": Kind(lambda: nn.Conv2d(IN, IN, 3, groups=IN), _images(2)),
    "Conv3d": Kind(lambda: nn.Conv3d(IN, OUT, 2), _images(3)),
    "Embedding": Kind(lambda: nn.Embedding(OUT, IN), lambda num: torch.randint(OUT, (num,))),
    "quantised, nf4": _quantised("bitsandbytes-nf4"),
    "quantised, int8": _quantised("bitsandbytes-int8"),
}
if has("transformers", "5"):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    KINDS |= {
        "experts": Kind(_experts(MixtralExperts, MixtralConfig), **_OF_EXPERTS),
        "experts, transposed": Kind(_experts(GptOssExperts, GptOssConfig), **_OF_GPT_OSS),
    }


MIXED = {f"{name}, mixed": replace(kind, channels=5) for name, kind in KINDS.items()}


class PadsByInput(nn.Conv2d):
    """Pads by the size of the input, as networks that come from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            (-size) % step for size, step in zip(x.shape[2:], self.stride, strict=True)
        )
        x = F.pad(x, (0, columns, 0, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardises(nn.Conv2d):
    """Its output is not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


# Padding is what convolutions differ in beside their sizes.
PADDED: dict[str, Callable[[], nn.Module]] = {
    "Conv1d, depthwise": lambda: nn.Conv1d(IN, IN, 4, padding=3, groups=IN, bias=False),
    "Conv2d, same": lambda: nn.Conv2d(IN, OUT, (2, 3), padding="same", dilation=(1, 2)),
    "Conv2d, reflect": lambda: nn.Conv2d(IN, OUT, 3, padding=2, padding_mode="reflect"),
    "Conv2d, circular": lambda: nn.Conv2d(IN, OUT, 3, 2, 1, groups=2, padding_mode="circular"),
    "Conv2d, replicate": lambda: nn.Conv2d(
        IN, OUT, (2, 3), padding="same", padding_mode="replicate"
    ),
    "Conv3d, groups": lambda: nn.Conv3d(IN, OUT, (2, 3, 2), padding=1, groups=2),
}
if has("timm"):
    from timm.layers import Conv2dSame

    PADDED |= {
        "Conv2d, by size": lambda: Conv2dSame(IN, OUT, (3, 2), stride=2, dilation=(2, 1)),
        "Conv2d, by size, depthwise": lambda: Conv2dSame(IN, IN, 3, 2, groups=IN),
    }
OWN_FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "Conv2d, pads by its input": lambda: PadsByInput(IN, IN, 3, stride=2, groups=IN),
    "Conv2d, standardises": lambda: Standardises(IN, OUT, 3),
}
# What no random walk is on: a subclass has its adapted kernel in it while its forward runs.
ALL = (
    KINDS
    | MIXED
    | {
        name: Kind(build, _images(int(name[4])))
        for name, build in {**PADDED, **OWN_FORWARDS}.items()
    }
)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[..., Tensor] = _call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@dataclass
class Twin:
    """A PEFT model, and all that is needed to say what it must do."""

    model: Any
    plain: nn.Module
    kind: Kind
    rng: random.Random

    def __post_init__(self) -> None:
        # Asked now: bitsandbytes casts the bias of its layers to what it has computed in last.
        weight = self.plain.bias if self.is_quantised else self.weight_of(self.plain)
        self.dtype = weight.dtype

    @property
    def key(self) -> str:
        """Name of the adapted layer in the model and in files."""
        in_layer = self.kind.parameter != "weight"
        return f"layer.{self.kind.parameter}" if in_layer else "layer"

    @property
    def layer(self) -> Any:
        return self.model.base_model.model.get_submodule(self.key)

    @property
    def is_quantised(self) -> bool:
        return isinstance(self.layer, QuantizedLinear)

    def weight_of(self, layer: nn.Module) -> Tensor:
        """Return what is adapted in a layer without adapters."""
        return getattr(layer, self.kind.parameter).data

    @property
    def adapters(self) -> list[str]:
        return list(self.layer.paca_delta)

    @property
    def active(self) -> list[str]:
        return list(self.layer.active_adapters)

    @property
    def merged(self) -> list[str]:
        return list(self.layer.merged_adapters)

    def update(self, name: str) -> Update:
        return self.layer.update_of(name)

    def trained(self, name: str = "default") -> list[nn.Parameter]:
        """Return the parameters of an adapter: delta, and mix where it has one."""
        return [*self.update(name).trained()]

    def inputs(self) -> Tensor:
        x = self.kind.inputs(self.rng.choice([3, 70]))
        return x.to(self.dtype) if x.is_floating_point() else x

    def expected(self, x: Tensor, names: list[str]) -> tuple[Tensor, list[Tensor]]:
        """Output of the plain layer with these adapters in its weight, and the values it used."""
        weight, trained = self.weight_of(self.plain), []
        if self.is_quantised:
            # A merge rounds again, which leaves nothing to add.
            base = self.layer.base_layer if self.merged else self.plain
            names = [] if self.merged else names
            weight = dequantized(self.layer.quantization_backend, base, self.dtype)
        for name in names:
            own = [value.detach().clone().requires_grad_() for value in self.trained(name)]
            where = self.update(name)[1:3]
            weight = nets.adapted(self.plain, weight, nets.product(*own), *where)
            trained += own
        if self.is_quantised:
            return F.linear(x, weight, self.plain.bias.to(self.dtype)), trained
        net = Net(self.plain, self.kind.call)
        changed = {f"layer.{self.kind.parameter}": weight}
        return torch.func.functional_call(net, changed, (x,)), trained

    def check(self, model: Any = None) -> None:
        """Compare the output and its gradients: of the input, and of deltas that are not merged.

        With a `model`, of what that gives: ours in another form.
        """
        x, names = self.inputs(), self.merged or self.active
        x.requires_grad_(x.is_floating_point())
        y, values = self.expected(x, names)
        out = (self.model if model is None else model)(x)
        self.close(out, y)
        inputs = [x] if x.requires_grad else []
        trained = [] if self.merged else [p for name in names for p in self.trained(name)]
        if not inputs + trained:
            return
        gy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, inputs + values[: len(trained)], gy)
        found = torch.autograd.grad(out, inputs + trained, gy)
        for ours, theirs in zip(found, wanted, strict=True):
            self.close(ours, theirs)

    def exact(self, x: Tensor, names: list[str], gy: Tensor) -> list[Tensor]:
        """Return output and gradients in float64."""
        plain, trained = copy.deepcopy(self.plain).double(), []
        weight = self.weight_of(plain)
        for name in names:
            own = [value.detach().double().requires_grad_() for value in self.trained(name)]
            weight = nets.adapted(plain, weight, nets.product(*own), *self.update(name)[1:3])
            trained += own
        changed = {f"layer.{self.kind.parameter}": weight}
        x = x.double() if x.is_floating_point() else x
        y = torch.func.functional_call(Net(plain, self.kind.call), changed, (x,))
        return [y, *torch.autograd.grad(y, trained, gy.double())]

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        # The kernel of 8-bit layers rounds x as well.
        is_int8 = self.is_quantised and self.layer.quantization_backend.backend_name == "bnb 8bit"
        tolerance = TOLERANCES[torch.bfloat16 if is_int8 else self.dtype]
        tolerance *= max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)

    def check_base(self) -> None:
        weight = self.weight_of(self.layer.get_base_layer())
        assert torch.equal(weight, self.weight_of(self.plain))


def twin_of(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.3) -> Twin:
    """Return an adapted layer of a kind, with random weights."""
    torch.manual_seed(seed)
    plain = ALL[kind].build().to(dtype).requires_grad_(False)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=std)
    model = adapted(plain, ALL[kind])
    return Twin(model, plain, ALL[kind], random.Random(seed))


def adapted(plain: nn.Module, kind: Kind, rank: int = 3) -> Any:
    options: Any = {"r": rank, "channels": kind.channels, "paca_alpha": 4, "init_weights": False}
    options |= targets_of(kind)
    return get_peft_model(Net(copy.deepcopy(plain), kind.call), PacaConfig(**options))


def targets_of(kind: Kind) -> dict[str, list[str]]:
    if "." in kind.target:
        return {"target_parameters": [kind.target], "target_modules": []}
    return {"target_modules": [kind.target]}
