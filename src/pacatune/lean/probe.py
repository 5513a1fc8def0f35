"""Finds out what a module computes from what it does, not from what it is called.

A candidate's own forward is run on a copy of the module without its weights: small linear layers
stand in for its children. If the result is that of down(act(gate(x)) * up(x)), or of one of the
known norms bit for bit, that is what the module is. So any class is found that computes these,
and none that does a little more; and no weight is read, which may be sharded or not there.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.lean.gated import ACTIVATIONS
from pacatune.lean.modules import GatedNames, apply_gated
from pacatune.lean.norm import Norm, plain_norm
from pacatune.lean.recompute import NO_CUT

_WIDTH, _INNER = 3, 5


def _is_linear(module: nn.Module | None) -> bool:
    """Whether a module, or the one in an adapter's layer, maps in_features to out_features."""
    # The adapter's own layer says it of convolutions and of bare parameters as well.
    get_base: Callable[[], Any] | None = getattr(module, "get_base_layer", None)
    base = module if get_base is None else get_base()
    sizes = (getattr(base, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def looks_like_gated(module: nn.Module) -> bool:
    """Whether a module has linear children of the shapes of a gated MLP, and an activation."""
    rest = _rest(module)
    others = [child for child in rest if not isinstance(child, nn.Dropout | nn.Identity)]
    has_activation = others or any(map(callable, vars(module).values()))
    return bool(has_activation) and next(_assignments(module), None) is not None


def _rest(module: nn.Module) -> list[nn.Module]:
    return [m for m in module._modules.values() if m is not None and not _is_linear(m)]


def _assignments(module: nn.Module) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each way to name gate, up and down, and whether gate and up are one layer."""
    linears: dict[str, Any] = {n: m for n, m in module._modules.items() if _is_linear(m)}
    shapes: dict[str, tuple[int, int]] = {
        name: (layer.in_features, layer.out_features) for name, layer in linears.items()
    }
    if len(shapes) == 3:
        for gate, up, down in itertools.permutations(shapes):
            if shapes[gate] == shapes[up] == shapes[down][::-1]:
                yield gate, up, down, False
    if len(shapes) == 2:
        for gate, down in itertools.permutations(shapes):
            width, inner = shapes[gate]
            if inner % 2 == 0 and shapes[down] == (inner // 2, width):
                yield gate, gate, down, True


def find_gated(module: nn.Module) -> GatedNames | None:
    """Return the parts of a gated MLP; None if the module is, or does, anything else."""
    rest = _rest(module)
    if len(rest) > 1 or any(True for m in rest for _ in m.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, _WIDTH, generator=generator, dtype=torch.float64, device="cpu")
    x[::2] *= 12  # where clipped activations differ
    for gate, up, down, is_fused in _assignments(module):
        inner = 2 * _INNER if is_fused else _INNER
        parts: dict[str, nn.Module] = {
            gate: _small(_WIDTH, inner, generator),
            down: _small(_INNER, _WIDTH, generator),
        }
        if not is_fused:
            parts[up] = _small(_WIDTH, _INNER, generator)
        result = _try(lambda parts=parts: _stand_in(module, parts).forward(x))  # type: ignore[misc]
        if result is None or result.shape != x.shape:
            continue
        for gate_first, activation in itertools.product((True, False), ACTIVATIONS.values()):
            names = GatedNames(gate, up, down, activation, is_fused, gate_first)
            if torch.allclose(result, apply_gated(parts, names, x, NO_CUT), rtol=1e-7, atol=1e-7):
                return names
    return None


def _small(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, dtype=torch.float64, device="cpu")
    for parameter in layer.requires_grad_(requires_grad=False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
    return layer


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module could be a norm: no children, at most a weight and a bias of one row."""
    if module._modules or module._buffers or not {"weight", "bias"} >= set(module._parameters):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    if not parameters:
        return hasattr(module, "normalized_shape")
    return all(p.dim() == 1 for p in parameters) and "norm" in type(module).__name__.lower()


def find_norm(module: nn.Module) -> Norm | None:
    """Return how a module normalises; None if it does anything else."""
    size = _row_size(module)
    if size is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, size, generator=generator, device="cpu")
    x[2:4] *= 1e-2  # where eps matters
    x[4:] *= 1e-4
    row = torch.randn(2, size, generator=generator, device="cpu")
    low, high = torch.bfloat16, torch.float32
    for norm in _norms(module):
        if all(_agrees(module, norm, x.to(dtype), row.to(dtype)) for dtype in (low, high)):
            mixes = all(
                _agrees(module, norm, x.to(dtype), row.to(other))
                for dtype, other in ((low, high), (high, low))
            )
            return replace(norm, mixes=mixes)
    return None


def _row_size(module: nn.Module) -> int | None:
    for parameter in module._parameters.values():
        if parameter is not None:
            return len(parameter)
    shape = tuple(getattr(module, "normalized_shape", ()))
    return int(shape[0]) if len(shape) == 1 else None


def _norms(module: nn.Module) -> Iterator[Norm]:
    found = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2]
    for eps in [*found, 1e-5, 1e-6, 1e-8, 1e-12]:
        yield Norm(eps)
        yield Norm(eps, plus_one=True, rounds_first=False)
        yield Norm(eps, rounds_first=False)
        yield Norm(eps, centred=True, rounds_first=False)


def _agrees(module: nn.Module, norm: Norm, x: Tensor, rows: Tensor) -> bool:
    parameters: dict[str, Tensor | None] = {
        name: None if own is None else rows[number]
        for number, (name, own) in enumerate(module._parameters.items())
    }
    result = _try(lambda: _stand_in(module, {}, parameters).forward(x))
    if result is None:
        return False
    expected = plain_norm(x, parameters.get("weight"), parameters.get("bias"), norm)
    return result.dtype == expected.dtype and torch.equal(result, expected)


def _stand_in(
    module: nn.Module,
    children: dict[str, nn.Module],
    parameters: dict[str, Tensor | None] | None = None,
) -> Any:
    """Return a module of the same class and attributes with other children and parameters."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other)["_modules"] = OrderedDict({**module._modules, **children})
    if parameters is not None:
        vars(other)["_parameters"] = OrderedDict(parameters)
    return other


def _try(function: Callable[[], Any]) -> Tensor | None:
    """Return what a function returns, without gradients; None if it fails or is no tensor."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            result = function()
        except Exception:  # whatever it needs that a stand-in has not got, it is something else
            return None
    return result if isinstance(result, Tensor) else None
