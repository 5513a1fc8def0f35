"""Linear layers whose weight tensor parallelism has split among processes (transformers' plans).

    style        W (O, I)       delta (O, R)         input         output
    column-wise  rows, O/P      rows, O/P            whole         this process's O/P, or gathered
    row-wise     columns, I/P   whole, on each       I/P or whole  summed over the processes
    not split    whole          whole, on each       whole         whole

Columns have the numbers of the whole weight, so a seed gives those of one process. A process that
holds I/P columns trains the chosen ones among them; the gradient of its delta is then the sum over
the processes, the same on each. Deltas are DTensors: optimisers, clip_grad_norm_ and PEFT's saving
and loading see the whole (O, R).

One adapter over the hooks of the plan alone is computed on the parts, with the hand-written
gradients, between the two steps of communication that the plan has anyway. What else there is
(several adapters, mixed batches, other hooks) runs on top of the base layer's own forward.
Nothing is written into a weight but by merging.
"""

import re
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.installation import require
from pacatune.ops.linear import apply_paca_linear
from pacatune.ops.pattern import expand
from pacatune.ops.products import autocast
from pacatune.tuner.additive import has_hooks
from pacatune.tuner.linear import Linear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Style(NamedTuple):
    """What a plan's word means for a linear layer."""

    dim: int | None
    """The dimension of the (O, I) weight that is split; None: it is whole."""
    splits_input: bool = False
    """Whether a row-wise layer gets its input whole."""
    gathers_output: bool = False
    """Whether a column-wise layer returns its output whole."""


_STYLES = {
    "colwise": _Style(0),
    "colwise_rep": _Style(0, gathers_output=True),
    "colwise_gather_output": _Style(0, gathers_output=True),
    "rowwise": _Style(1),
    "rowwise_rep": _Style(1, splits_input=True),
    "rowwise_split_input": _Style(1, splits_input=True),
    "replicate": _Style(None),
}
# Styles of a parent that leave what its layers get and return as it is.
_TRANSPARENT = ("local_params", "replicate")
_TP = "tp"


@dataclass(frozen=True, eq=False)
class Split:
    """How one linear layer is split."""

    style: _Style
    mesh: "DeviceMesh"
    """The processes that share the weight."""
    data_mesh: "DeviceMesh | None"
    """Processes with other data that nobody else averages the gradients over: of a model that was
    sharded by FSDP2 as well before it was adapted."""
    hook: Any
    """The forward by which the plan has replaced the layer's own, None if it has not or if
    somebody has wrapped it since."""

    def enter(self, x: Tensor) -> Tensor:
        """Return this process's part of the input, (..., I) column-wise and (..., I/P) row-wise."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if self.style.dim == 0:
            return _reduced(x, self.mesh, "sum")
        if not self.style.splits_input:
            return x
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(x.dim() - 1)]).to_local()

    def leave(self, y: Tensor, out_features: int) -> Tensor:
        """Return the layer's output from what this process has computed of it."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if self.style.dim == 1:
            whole = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        elif self.style.gathers_output:
            shape = torch.Size((*y.shape[:-1], out_features))
            stride = torch.empty(shape, device="meta").stride()
            whole = DTensor.from_local(
                y, self.mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride
            )
        else:
            return y
        return whole.redistribute(placements=[Replicate()]).to_local()

    def distribute(self, delta: Tensor) -> Tensor:
        """Return an (O, R) update as a DTensor of its parts; the first process's values count."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        if self.data_mesh is not None:
            same = [Replicate()] * self.data_mesh.ndim
            delta = distribute_tensor(delta, self.data_mesh, same).to_local()
        placement = Shard(0) if self.style.dim == 0 else Replicate()
        return distribute_tensor(delta, self.mesh, [placement])

    def part(self, delta: Any) -> Tensor:
        """Return this process's rows of a distributed update, or all of it.

        Its gradient is summed over the processes that hold the same, each of which has a part.
        """
        from torch.distributed.tensor import DTensor

        # Not `_local`: a compiler sees this type, but not what it has.
        local = delta.to_local() if isinstance(delta, DTensor) else delta
        if self.style.dim == 1:
            local = _reduced(local, self.mesh, "sum")
        return local if self.data_mesh is None else _reduced(local, self.data_mesh, "avg")


def _reduced(x: Tensor, mesh: "DeviceMesh", op: str) -> Tensor:
    """Return `x` itself, whose gradient is reduced over the processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not torch.is_grad_enabled():
        return x
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.to_local(grad_placements=[Partial(op)] * mesh.ndim)


class _Own(NamedTuple):
    """What of an adapter's columns a process has to do with."""

    indices: Tensor
    """The adapter's, from which the others were found,"""
    version: int
    """and their version then."""
    rows: Tensor | None
    """The pattern of its rows, one by one."""
    places: Tensor | None
    """Which of the U columns it holds, None: all,"""
    columns: Tensor
    """and where they are in this process's part of the weight."""


class TensorParallelLinear(Linear):
    """An adapted nn.Linear of a model under one of transformers' tensor parallel plans."""

    split: Split
    _own: dict[str, _Own]

    def __init__(self, *args: Any, split: Split, **kwargs: Any) -> None:
        self.__dict__.update(split=split, _own={})  # nn.Module's constructor leaves them alone
        super().__init__(*args, **kwargs)

    def _attach(self) -> None:
        """Have no residency: columns are added, never written."""

    def why_additive(self) -> str:
        """Say why the columns are not in the base weight: they never are."""
        return "its weight is split by a tensor parallel plan"

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or replace the one of that name, and share its delta out."""
        super().update_layer(adapter_name, *args, **kwargs)
        delta = self.delta_of(adapter_name)
        shared = nn.Parameter(self.split.distribute(delta.detach()), delta.requires_grad)
        # Not by name: PEFT's `low_cpu_mem_usage` would rebuild it, as what it is not.
        self.paca_delta[adapter_name]._parameters["weight"] = shared

    def whole_delta(self, adapter_name: str) -> Tensor:
        """Return one adapter's (O, R) update; the processes must call this together."""
        delta: Any = self.delta_of(adapter_name).detach()
        return cast(Tensor, delta.full_tensor())

    def replace_update(
        self,
        adapter_name: str,
        delta: Tensor,
        indices: Tensor,
        paca_alpha: float,
        places: Tensor | None = None,
    ) -> None:
        """Give an adapter other values, the same whole (O, R) of them on each process."""
        old = self.delta_of(adapter_name)
        shared = self.split.distribute(delta.to(device=old.device, dtype=old.dtype))
        super().replace_update(adapter_name, shared, indices, paca_alpha, places)

    def _is_bare(self, base: dict[str, Any]) -> bool:
        others = {key: value for key, value in base.items() if key != "forward"}
        return base.get("forward") is self.split.hook and not has_hooks(others)

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        """Apply one adapter by the hand-written gradients, on this process's parts."""
        update = self._single_update()
        if update is None:
            return None
        delta, _, scaling, _ = update
        (name,) = self.active_adapters
        weight, bias = (_local(self.base_layer._parameters[one]) for one in ("weight", "bias"))
        added = None if self.split.style.dim == 1 else bias  # row-wise: once, to the sum
        x = autocast(self.split.enter(x))
        delta, indices = self._part(self.split.part(delta), name)
        y = apply_paca_linear(x, weight, delta, indices, scaling, None, added, False)
        y = self.split.leave(y, self.out_features)
        return y if added is bias else y + cast(Tensor, bias).to(y.dtype)

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        def apply(x: Tensor, update: Any) -> Tensor:
            update, indices = self._part(self.split.part(update), name)
            return F.linear(x.index_select(-1, indices).to(dtype), update.to(dtype))

        x = self.split.enter(x)
        y = self.paca_delta[name](x, self.scaling[name], apply)
        return self.split.leave(y, self.out_features)

    def _part(self, delta: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return what a process applies of an update, and the columns of its weight for that."""
        indices = self.paca_indices[name]
        own = self._own.get(name)
        if own is None or own.indices is not indices or own.version != indices._version:
            own = self._own[name] = self._find_own(indices, self.places_of(name))
        update = expand(delta, own.rows, len(indices))
        return update if own.places is None else update.index_select(1, own.places), own.columns

    def _find_own(self, indices: Tensor, rows: Tensor | None) -> _Own:
        mesh, dim = self.split.mesh, self.split.style.dim
        size = self.out_features if dim == 0 else self.in_features
        width = -(-size // mesh.size())  # the last parts may be narrower, or empty
        first = min(mesh.get_local_rank() * width, size)
        with torch.inference_mode(False):  # a training pass may use them after an evaluation
            if dim == 0 and rows is not None:
                rows = rows.repeat_interleave(size // len(rows), 0)[first : first + width]
            if dim != 1:
                return _Own(indices, indices._version, rows, None, indices)
            columns = indices - first
            places = ((columns >= 0) & (columns < width)).nonzero().flatten()
            return _Own(indices, indices._version, rows, places, columns[places])

    # Merging, of the parts: the same on all processes together.

    def _weight_to_merge(self) -> Tensor:
        weight: Any = super()._weight_to_merge()
        is_part = getattr(weight, "device_mesh", None) == self.split.mesh
        return cast(Tensor, weight.to_local() if is_part and not self.shares_weight else weight)

    def _columns_to_merge(self, name: str) -> tuple[Tensor, Tensor]:
        update, indices = self._part(_local(self.delta_of(name)), name)
        return indices, update


def _local(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


# What a plan says of a layer.


def split_of(
    model: nn.Module, name: str, module: nn.Module, parameter_name: str = "weight"
) -> Split | None:
    """Return how a target is split, None where no tensor parallel plan has to do with it.

    Args:
        model: The whole model, whose plan is read.
        name: The target's name in it.
        module: The target, or the module that it is a parameter of.
        parameter_name: Its name there.

    Raises:
        ValueError: If the target is split in a way that is not supported; layer and style are
            named.
    """
    weight: Any = getattr(module, parameter_name, None)
    plan = _plan_over(model, name)
    if plan is None:
        if _is_part(weight, model) or hasattr(module, "_hf_tp_plan"):
            _refuse(name, "it was split by something else than a plan of transformers >= 5.17")
        return None
    require("transformers", "5.17", "tensor parallelism")
    styles, mesh, inner_name = plan
    parent = inner_name
    while parent := parent.rpartition(".")[0]:
        if (of_parent := styles.get(_generic(parent), "replicate")) not in _TRANSPARENT:
            _refuse(name, f"it is inside {parent!r}, whose style is {of_parent!r}")
    word = styles.get(_generic(inner_name), "replicate")
    style = _STYLES.get(word)
    if type(module).forward is not nn.Linear.forward or parameter_name != "weight":
        if word == "replicate" and not _is_part(weight, model):
            return None
        style = None
    if style is None or not _fits(weight, style):
        _refuse(name, f"its style is {word!r} and its module a {type(module).__name__}")
    data = [one for one in _dims_of(weight) if one != _TP]
    data_mesh = weight.device_mesh[tuple(data)] if data else None
    forward = module.__dict__.get("forward")
    is_of_plan = getattr(forward, "__module__", "").startswith("transformers.distributed.")
    is_wrapper = not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__")
    return Split(style, mesh, data_mesh, forward if is_of_plan and not is_wrapper else None)


def refuse_copies(model: nn.Module, names: list[str] | None) -> None:
    """Refuse to train copies of modules that a plan has split.

    A copy would run the forward that the plan has bound to the original, and train nothing.

    Args:
        model: The whole model, whose plan is read.
        names: Ends of module names, as `modules_to_save` has them.

    Raises:
        ValueError: If one of the modules, or one inside it, has a style.
    """
    for name, module in model.named_modules() if names else ():
        if name.endswith(tuple(names or ())) and (style := _style_inside(model, name, module)):
            raise ValueError(
                f"`modules_to_save` ({names}): {name!r} is split over several processes (style "
                f"{style!r}), and its copy would not be trained. Leave it out, or load the model "
                "without a `tp_plan`."
            )


def _style_inside(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return the style of a module or of one in it, None where no plan changes any of them."""
    for inner in (f"{name}.{one}".rstrip(".") for one, _ in module.named_modules()):
        plan = _plan_over(model, inner)
        style = plan[0].get(_generic(plan[2]), "replicate") if plan else "replicate"
        if style != "replicate":
            return style
    return None


def _plan_over(model: nn.Module, name: str) -> tuple[dict[str, str], "DeviceMesh", str] | None:
    """Return the styles of the plan over a module, its processes, and the module's name in it."""
    owner: Any = model
    while owner is not None:
        # Not by getattr: PEFT's wrappers answer for the model inside them.
        mesh = vars(owner).get("_device_mesh")
        if mesh is not None and (vars(owner).get("_tp_size") or 1) > 1:
            return owner.tp_plan or {}, mesh[_TP] if mesh.ndim > 1 else mesh, name
        part, _, name = name.partition(".")
        owner = owner._modules.get(part)
    return None


def _generic(name: str) -> str:
    """Return the name by which a plan knows all layers of a kind."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _dims_of(weight: Any) -> tuple[str, ...]:
    """Return the names of the mesh dimensions over which a weight is spread."""
    mesh = getattr(weight, "device_mesh", None)
    return () if mesh is None else tuple(mesh.mesh_dim_names or ())


def _fits(weight: Any, style: _Style) -> bool:
    """Whether a weight is split as the style says, and no other way."""
    from torch.distributed.tensor import Replicate, Shard

    spread = dict(zip(_dims_of(weight), getattr(weight, "placements", ()), strict=True))
    expected = Replicate() if style.dim is None else Shard(style.dim)
    return spread.get(_TP, Replicate()) == expected


def _is_part(weight: Any, model: nn.Module) -> bool:
    """Whether a weight is a part when its module runs, and not gathered before by FSDP2."""
    num_shards = sum(not one.is_replicate() for one in getattr(weight, "placements", ()))
    if num_shards == 0:
        return False
    from torch.distributed.fsdp import FSDPModule

    is_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return num_shards > 1 or not is_fsdp


def _refuse(name: str, how: str) -> NoReturn:
    raise ValueError(
        f"{name!r} shares its work with other processes (tensor parallelism) in a way that is not "
        f"supported: {how}. Supported are nn.Linear layers of the styles {sorted(_STYLES)}; take "
        f"{name!r} out of the targets, or load the model without a `tp_plan`."
    )
