"""The trainer's side: the columns of W' after a step, of whatever holds the weights.

    plain            originals that the residency keeps, or the pretrained weight: nothing is
                     written, nobody looks
    FSDP2, TP        deltas are gathered, (O, R) of each layer; the originals once
    ZeRO-3           each layer is gathered as DeepSpeed does it, its weight the first time only
    4 bits           a weight is dequantised once, as each training pass does it

The bits are those of `ops.columns.adapted_columns`, which training, merging and patches have. They
are rounded to the dtype that is served once, after that.
"""

import importlib
import secrets
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pacatune.format.tensors import plain_name
from pacatune.grid.checkpoint import FileColumns, PackedCheckpoint
from pacatune.ops.columns import mixed, read_columns
from pacatune.ops.whole import is_shared_out, is_whole, whole_shape
from pacatune.sync.adapted import Adapted, base_of, layers_of
from pacatune.sync.message import Columns, ColumnSet, Positions
from pacatune.tuner.compat import as_saved
from pacatune.tuner.quantized import dequantized

if TYPE_CHECKING:
    from pacatune.sync.transport import Transport


class ColumnSource:
    """Gives the columns of an adapted model to those who serve it.

    With FSDP2 or ZeRO-3 all processes of the trainer make a source, and call
    its methods together; each gets the same columns, and one of them sends.

    Args:
        model: A PEFT model with a PaCA adapter, perhaps compiled, sharded or wrapped for DDP.
        dtype: In which the model is served; None: that of each weight.
        adapter: Name of the adapter; None: the one that is active when columns are asked for.
        complete_every: One in so many syncs does not follow the one before, so that a receiver of
            compressed ones may begin with it.
        codes: The FP8 checkpoint whose codes are served, if the model was dequantised from one:
            codes are sent then, those nearest to the columns. `GridSteps` lets the trainer compute
            with just these.

    Raises:
        ValueError: If the model has no PaCA adapter, trains more than columns, or its weights have
            no columns that a server could exchange: quantised, tied, flattened by FSDP1.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        *,
        adapter: str | None = None,
        complete_every: int = 64,
        codes: PackedCheckpoint | None = None,
    ) -> None:
        if complete_every < 1:
            raise ValueError(
                f"`complete_every` ({complete_every}) must be at least 1, with which all syncs are "
                "complete."
            )
        self.model, self.dtype, self.adapter = model, dtype, adapter
        self.complete_every, self.codes = complete_every, codes
        self._last: Tensor | None = None  # buffer of the last sync
        self.number = 0  # of the last sync
        self._run = secrets.token_hex(8)
        self._weights: list[_Weight] = []
        self._positions: Positions | None = None
        self._state: list[tuple[int, ...]] = []  # of the adapted weights, by which they are known
        self.positions()

    def positions(self) -> Positions:
        """Return where the columns are now; another version after another adapter or selection."""
        adapted = list(layers_of(self.model, self.adapter))
        if self._positions is not None and [weight.state for weight in adapted] == self._state:
            return self._positions
        _refuse_more(self.model)
        base = base_of(self.model)
        self._weights = [_Weight(base, weight, self.dtype, self.codes) for weight in adapted]
        self._state = [weight.state for weight in adapted]
        shapes = {
            plain_name(name): whole_shape(parameter)
            for name, parameter in base.named_parameters()
            if "paca_delta" not in name
        }
        sets = tuple(weight.columns for weight in self._weights)
        self._positions = Positions(sets=sets, shapes=shapes, run=self._run)
        self.forget()
        return self._positions

    def columns(self) -> Columns:
        """Return the columns as they are now: the next sync.

        They are those that the model computes with: while its adapters are disabled, the base's.

        Raises:
            ValueError: If a column is not finite, or an adapter is merged into the weights.
        """
        return self._collect(is_base=False)

    def base_columns(self) -> Columns:
        """Return the base's columns; the sync that comes next follows none."""
        self.forget()
        columns = self._collect(is_base=True)
        self.forget()
        return columns

    def send(self, transport: "Transport | None", *, timeout: float | None = None) -> Columns:
        """Send the columns.

        Args:
            transport: Transport of the process that sends; None on the trainer's other processes.
            timeout: Seconds; None: the transport's own.

        Returns:
            What was sent.

        Raises:
            TimeoutError, ConnectionError: If the receiver is gone. Nothing is lost: the next send,
                over this transport or another one, follows none.
        """
        columns = self.columns()
        if transport is not None:
            try:
                transport.send(columns, timeout)
            except BaseException:
                self.forget()
                raise
        return columns

    def forget(self) -> None:
        """Have the next sync follow none: a receiver was lost, or a new one has come."""
        self._last = None

    @torch.no_grad()
    def _collect(self, *, is_base: bool) -> Columns:
        _reshard(self.model)
        positions = self.positions()
        buffer = torch.empty(positions.num_bytes, dtype=torch.uint8, device=self._weights[0].device)
        views = positions.by_name(buffer)
        for weight in self._weights:
            views[weight.columns.name].copy_(weight.values(is_base))
        _refuse_infinite(views, buffer)
        if self.number % self.complete_every == 0:
            self.forget()
        last, self._last = self._last, buffer
        self.number += 1
        return Columns(positions=positions, number=self.number, buffer=buffer, last=last)


def _refuse_infinite(views: dict[str, Tensor], buffer: Tensor) -> None:
    """Refuse columns that are not finite; `views` are those in the buffer, by name."""
    dtypes = {view.dtype for view in views.values()}
    if len(dtypes) == 1:  # by one look; both ends are NaN if one value is
        ends = torch.stack(torch.aminmax(_plain(buffer.view(*dtypes))))
        if ends.isfinite().all():
            return
    is_finite = torch.stack([_plain(view).isfinite().all() for view in views.values()]).tolist()
    wrong = [name for name, ok in zip(views, is_finite, strict=True) if not ok]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(views)} tensors, first {wrong[0]!r}, have columns that are "
            f"not finite in {views[wrong[0]].dtype}; nothing was sent. Training has diverged (go "
            "back to a checkpoint), or the dtype is too narrow: serve bfloat16 or float32."
        )


def _plain(values: Tensor) -> Tensor:
    """Return numbers that torch can compare; FP8's it cannot."""
    return values.float() if values.itemsize == 1 else values


class _Weight:
    """One adapted weight of the trainer."""

    def __init__(
        self,
        base: Any,
        adapted: Adapted,
        dtype: torch.dtype | None,
        codes: PackedCheckpoint | None,
    ) -> None:
        parameter, self.layer, self.adapter = adapted
        layout = self.layer.layout
        self.indices = self.layer.paca_indices[self.adapter]
        self.kept: tuple[tuple[Any, ...], Tensor] | None = None  # originals that were gathered
        weight = self._weight()
        _refuse_weight(self.layer, parameter, weight)
        self.device, shape = weight.device, whole_shape(weight)
        if self.layer.quantization_backend is not None:
            shape = tuple(layout.dense_shape)
            dtype = dtype or cast(Any, self.layer.get_base_layer()).compute_dtype
            if dtype is None:
                raise ValueError(
                    f"{parameter!r} is in 4 bits and does not say in what it computes; give the "
                    "sampler's dtype: `ColumnSource(model, dtype)`."
                )
        self.columns = ColumnSet.at(
            name=_checkpoint_name(base, parameter, shape),
            parameter=parameter,
            dim=layout.weight_dim,
            shape=shape,
            dtype=dtype or weight.dtype,
            indices=self.indices.detach().cpu().clone(),
        )
        self.coded = None if codes is None else self._coded(codes, base.config.get_text_config())
        if self.coded is not None:
            values = self.columns.values.to(torch.float8_e4m3fn)
            self.columns = replace(self.columns, values=values)

    def _coded(self, codes: PackedCheckpoint, config: Any) -> FileColumns | None:
        """Return the columns as a checkpoint's codes, which must be bytes of FP8; None: numbers."""
        name = self.columns.name
        grid = codes.grid(codes.name_of(name, config.num_hidden_layers))
        if grid is None:
            return None
        if grid.name != "F8_E4M3":
            raise ValueError(
                f"{codes.title} holds {name!r} as {grid.name}, and codes of F8_E4M3 alone are "
                "synced; serve a patch (`pacatune patch`), or 16 bits."
            )
        if is_shared_out(self._weight()) or self.layer.quantization_backend:
            raise ValueError(
                f"{name!r} is spread over processes, or quantised otherwise; codes are synced of a "
                "base that one process holds, dequantised: train it so, or serve 16 bits."
            )
        return FileColumns(codes, name, self._originals(), self.indices, config)

    def _weight(self) -> Any:
        # Past the guard: to look would put the pretrained columns back, and nothing is looked at.
        base = self.layer.get_base_layer()
        return dict.get(base.__dict__["_parameters"], self.layer.parameter_name)

    def values(self, is_base: bool) -> Tensor:
        """Return the columns as they are sent, but for the last rounding."""
        layer: Any = self.layer
        if layer.merged_adapters:
            raise ValueError(
                f"adapters {layer.merged_adapters} are merged into {self.columns.name!r}; columns "
                "are sent unmerged: call `model.unmerge_adapter()` first."
            )
        update = layer.update_of(self.adapter)
        with _gathered(self._weight() if self.kept is None else None, *update.trained()):
            delta, scaling = None, update.scaling
            if not (is_base or layer._disable_adapters):
                factors = [_whole(factor, self.columns.name) for factor in update.trained()]
                delta = factors[0] if update.mix is None else mixed(*factors)
            if (coded := self.coded) is not None:
                codes = coded.before if delta is None else coded.moved(delta, scaling).after
                return codes.view(self.columns.dtype)
            values = self._originals()
            if delta is not None:
                values = layer.layout.adapted(values, delta.to(values.device), scaling)
            return values

    def _originals(self) -> Tensor:
        """Return the base's columns; of a weight that is spread, or in 4 bits, they are kept."""
        weight, residency = self._weight(), self.layer.residency
        backend = self.layer.quantization_backend
        is_spread = is_shared_out(weight) or backend is not None
        token = _identity_of(weight)
        if self.kept is not None and self.kept[0] == token:
            return self.kept[1]
        if residency is not None and not is_spread:
            originals = residency.originals(self.indices)
            if originals is not None:
                return originals
        if backend is not None:  # as the training pass does it
            weight = dequantized(backend, self.layer.get_base_layer(), self.columns.dtype)
        whole = _whole(weight, self.columns.name)
        columns = read_columns(whole, self.indices.to(whole.device), dim=self.columns.dim)
        if is_spread:
            self.kept = token, columns
        return columns


# Weights without columns that a server could exchange, and what checkpoints call the others.


def _refuse_more(model: nn.Module) -> None:
    """Refuse a model that trains more than columns."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "paca_delta" not in name:
            raise ValueError(
                f"the model also trains {name!r}, which is no column, so a server would lack it; "
                "train columns alone (no `bias`, no `modules_to_save`), or send whole tensors."
            )


def _refuse_weight(layer: Any, parameter: str, weight: Any) -> None:
    """Refuse a weight without columns that a server could exchange."""
    backend = layer.quantization_backend
    if backend is not None and backend.backend_name != "bnb 4bit":
        raise ValueError(
            f"{parameter!r} is quantised ({backend.backend_name}), and trained by kernels of its "
            "own, which no server in 16 bits repeats. Train on the base in 16 bits or in "
            "bitsandbytes' 4, or serve the adapter (`pacatune export --to lora`)."
        )
    if (why := layer.layout.why_no_columns) is not None:
        raise ValueError(
            f"{parameter!r} is the kernel of {why}, whose trained channels are no columns of it; "
            "leave it out of the targets."
        )
    if layer.shares_weight:
        raise ValueError(
            f"{parameter!r} is tied to another module (lm_head and embedding), and a server has "
            "one tensor for both; leave it out of the targets."
        )
    is_here = weight is not None and is_whole(weight, len(layer.layout.dense_shape))
    if not (is_here or is_shared_out(weight)):
        _refuse_absent(parameter)


def _checkpoint_name(base: Any, parameter: str, shape: tuple[int, ...]) -> str:
    """Return what the checkpoint calls a parameter that it holds as it is, else its own name."""
    if not hasattr(base, "config"):
        return parameter
    tensor = torch.empty(shape, device="meta")
    try:
        saved = as_saved(base, {parameter: tensor})
    except Exception:  # of a conversion that wants the parameters beside this one
        return parameter
    ((name, other),) = saved.items() if len(saved) == 1 else ((parameter, tensor),)
    return name if other.shape == tensor.shape else parameter


# Values that are spread over a trainer's processes: FSDP2's and ZeRO-3's.


def _reshard(model: nn.Module) -> None:
    """Have FSDP2 show its shards: what it gathered is not what the optimiser has changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _identity_of(weight: Any) -> tuple[Any, ...]:
    """Tell one pretrained weight from another."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if hasattr(weight, "ds_id"):  # DeepSpeed's own; its memory comes and goes
        return ("ds", weight.ds_id)
    return local._version, local.data_ptr()


def _gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Let DeepSpeed gather what it has partitioned."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    deepspeed = importlib.import_module("deepspeed")
    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(partitioned))


def _whole(parameter: Any, name: str) -> Tensor:
    """Return all values of a parameter that may be spread; ZeRO-3's must be `gathered`."""
    values = parameter.detach()
    if hasattr(values, "full_tensor"):
        return cast(Tensor, values.full_tensor())
    if not values.numel():
        _refuse_absent(name)
    return cast(Tensor, values)


def _refuse_absent(name: str) -> NoReturn:
    """Refuse a tensor whose values cannot be brought here."""
    raise ValueError(
        f"{name!r} is empty here, flat (FSDP 1) or on the meta device: its values are offloaded, "
        "or spread over the processes; keep the model on its devices, use FSDP 2, or call this "
        "inside deepspeed.zero.GatheredParameters(list(model.parameters()))."
    )
