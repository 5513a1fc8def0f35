"""Runs the real training step of the real model on fake tensors, and measures what it holds.

Fake tensors have storages with a size and no memory. Tensors of the meta device would not do: they
take no part in autocast. Modules keep their classes and code. What cannot work without memory is
PaCA's watch over who else holds a weight; `_FakeResidency` takes the answers of a training run on
one device, where nobody does.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks

from pacatune import lean
from pacatune.measure.counters import count_flops
from pacatune.measure.gpu_kernels import allocations_of_gpu
from pacatune.measure.methods import add_adapter
from pacatune.measure.models import (
    checkpoint_blocks,
    is_4bit,
    load_config,
    make_skeleton,
    pack_,
    quantize_,
)
from pacatune.measure.setting import Setting
from pacatune.measure.tracker import CATEGORIES, Category, StorageTracker, storage_key
from pacatune.reports.rows import Row
from pacatune.residency import Residency
from pacatune.tuner.layer import PacaLayer

# Outside PyTorch's allocator: the CUDA context, the code of kernels, the workspaces of cuBLAS. An
# idle process with PyTorch's kernels loaded shows some 0.4 GiB on an A100 and 0.6 on an H100.
_CONTEXT_BYTES = (int(0.4 * 2**30), int(0.7 * 2**30))
# Share of what comes and goes within a step that the allocator holds beyond it: it rounds blocks up
# to 512 bytes or 2 MiB, keeps gaps between them, and what it has cached. No GPU was measured here:
# the upper end is what the paper's Table 1 needs, whose LLaMA2-7B with PaCA is 0.20 of it above the
# simulated peak and the largest context. What stays for the whole run is allocated once.
_FRAGMENTATION = (0.0, 0.2)
_STATIC: tuple[Category, ...] = ("weights", "adapter", "optimizer", "gathered")
# bitsandbytes' own numbers: values per scale, and scales per scale of those.
_BLOCK, _NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class Estimate:
    """The memory of one setting on one device, in bytes."""

    setting: Setting
    peak_bytes: int
    """Most that tensors take at once; what `torch.cuda.max_memory_allocated` would show."""
    by_category: dict[Category, int]
    """Parts of the peak."""
    peak_phase: str
    """When the peak is: forward, backward or optimizer."""
    saved_by_module: dict[str, int]
    """What is kept for backward when the forward pass ends, by the kind of module that keeps it."""
    notes: list[str] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int:
        """What is kept for backward when the forward pass ends."""
        return sum(self.saved_by_module.values())

    @property
    def low_bytes(self) -> int:
        """Least that the device needs: the peak and a small CUDA context."""
        return self._device_bytes(0)

    @property
    def high_bytes(self) -> int:
        """Most that the device should need: a large context, and gaps between blocks."""
        return self._device_bytes(1)

    def _device_bytes(self, end: int) -> int:
        moving = sum(number for name, number in self.by_category.items() if name not in _STATIC)
        return self.peak_bytes + _CONTEXT_BYTES[end] + int(moving * _FRAGMENTATION[end])

    def fits(self, available_bytes: int) -> Literal["yes", "perhaps", "no"]:
        """Say whether a device with this much memory is enough, for the whole spread."""
        if self.high_bytes <= available_bytes:
            return "yes"
        return "perhaps" if self.low_bytes <= available_bytes else "no"

    def rows(self, method: str) -> list[Row]:
        """Return the parts of the peak, their sum, and what a device needs, in GiB."""
        parts: dict[str, int] = dict(self.by_category.items())
        parts |= {"peak": self.peak_bytes}
        parts |= {"a device needs": self.low_bytes, "or as much as": self.high_bytes}
        names: dict[str, Any] = {"what": "memory", "method": method, "model": self.setting.model}
        return [
            Row(setting=part, value=number / 2**30, unit="GiB", origin="simulated", **names)
            for part, number in parts.items()
        ]

    def to_values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "by_category": self.by_category,
            "peak_phase": self.peak_phase,
            "saved_bytes": self.saved_bytes,
            "saved_by_module": self.saved_by_module,
            "device_bytes": {"low": self.low_bytes, "high": self.high_bytes},
            "setting": asdict(self.setting),
            "notes": self.notes,
        }


class FakeTraining:
    """A model ready for training steps of any batch and length, without weights.

    Everything but the batch and the length stays as in the setting.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        config = load_config(setting.model)
        model: Any = make_skeleton(config, setting.model, setting.weight_dtype)
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._by_size: tuple[int, int] | None = None
        if setting.is_packed:
            pack_(model, setting)
        elif setting.quantization is not None and find_spec("bitsandbytes") is None:
            self._by_size = _sizes_in_4_bits(model, setting)
        elif setting.quantization is not None:
            quantize_(model, setting.quantization, setting.compute_dtype)
            _pack_weights(model, setting)
        # As `pacatune train`, every method adapts the linear layers of the blocks by default.
        self.model: nn.Module = model
        if setting.row.has_adapter:
            try:
                self.model = add_adapter(
                    model,
                    setting.row,
                    rank=setting.rank,
                    channels=setting.channels,
                    dropout=setting.dropout,
                    targets=setting.target_modules,
                )
            except NotImplementedError as error:  # torch's, of a tensor without values
                raise ValueError(
                    f"`method` ({setting.method!r}) looks at values when its adapter is made, so "
                    "its memory cannot be estimated."
                ) from error
        self.base: Any = model
        if setting.lean != "off":
            lean.enable(model, mode=setting.lean, level=setting.lean_level)
        if setting.gradient_checkpointing:
            checkpoint_blocks(model)
        model.config.use_cache = False
        self.model.train()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake():
            self._weights, self._adapter = _materialize(self.model, setting)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._gathered = _gathered_bytes(self.model) if setting.shares_weights else 0

    def max_rank(self) -> int:
        """Return the most columns that every adapted layer has."""
        return min(
            int(cast(Any, module).in_features)
            for module in self.model.modules()
            if isinstance(module, BaseTunerLayer)
        )

    @contextmanager
    def _fake(self) -> Iterator[None]:
        with self._mode, allocations_of_gpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values, of which there are none
            yield

    def step(self, batch_size: int, seq_len: int) -> Estimate:
        """Measure one optimiser step in the middle of training, of `batch_size` per micro-batch."""
        tracker = StorageTracker(_shares(self.setting))
        try:
            with self._fake(), tracker:
                saved = self._run(tracker, batch_size, seq_len)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"model {self.setting.model}: {type(self.base).__name__} decides by values what it "
                f"computes ({error}), as routers of experts do; its memory cannot be estimated."
            ) from error
        notes = []
        if self._positions is not None and seq_len > self._positions:
            notes.append(f"the model was made for {self._positions} tokens, not {seq_len}.")
        parts = {
            category: tracker.by_category[category]
            for category in CATEGORIES
            if tracker.by_category[category]
        }
        setting, peak = self.setting.but(batch_size=batch_size, seq_len=seq_len), tracker.peak_bytes
        if self._by_size is not None:
            less, dequantized = self._by_size
            parts["weights"] -= less
            parts["temporaries"] = parts.get("temporaries", 0) + dequantized
            peak += dequantized - less
            notes.append("bitsandbytes is not installed: 4-bit weights are counted by their size.")
        return Estimate(setting, peak, parts, tracker.peak_phase, saved, notes)

    def count_operations(self, batch_size: int, seq_len: int) -> dict[str, int]:
        """Count the operations of a micro-batch exactly, at any size; see `count_flops`."""
        # By the CPU's attention, whose products are counted; those of GPUs only allocate here.
        with self._mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="cpu")
            return count_flops(lambda: self._loss(ids))

    def _run(self, tracker: StorageTracker, batch_size: int, seq_len: int) -> dict[str, int]:
        tracker.hold(self._weights, "weights")
        tracker.hold(self._adapter, "adapter")
        if self._gathered:
            room = torch.empty(self._gathered, dtype=torch.uint8, device="cpu")
            tracker.hold([room], "gathered")
        optimizer = _warm_optimizer(self._trained, tracker)
        tracker.hold(_kept_aside(self.model), "adapter")
        tracker.watch_gradients(self._trained)
        tracker.reset_peak()
        for _ in range(min(2, self.setting.gradient_accumulation)):
            saved = self._micro_batch(tracker, batch_size, seq_len)
        tracker.phase = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
        return saved

    def _micro_batch(
        self, tracker: StorageTracker, batch_size: int, seq_len: int
    ) -> dict[str, int]:
        ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="cpu")
        tracker.phase = "forward"
        away: AbstractContextManager[Any] = nullcontext()
        if self.setting.activation_offloading:
            away = _Offloaded([*self._weights, *self._adapter])
        with torch.autocast("cpu", dtype=self.setting.compute_dtype), away:
            loss = self._loss(ids)
        tracker.settle_activations(ids, loss)
        saved = tracker.owned_by_module("activations")
        tracker.phase = "backward"
        loss.backward()
        return saved

    def _loss(self, ids: Tensor) -> Tensor:
        if self.setting.loss_kind == "chunked":
            return _chunked_loss(self.base, ids)
        return cast(Tensor, self.base(input_ids=ids, labels=ids).loss)


class _Offloaded(saved_tensors_hooks):
    """Takes what autograd keeps off the device, but for what stays there; a copy comes back."""

    def __init__(self, staying: Iterable[Tensor]) -> None:
        super().__init__(self._pack, self._unpack)
        self._held = {storage_key(x) for x in staying}

    def _pack(self, x: Tensor) -> Any:
        if storage_key(x) in self._held:
            return x.detach()
        return x.size(), x.stride(), x.dtype

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        size, stride, dtype = kept
        return torch.empty_strided(size, stride, dtype=dtype)


def _chunked_loss(model: Any, ids: Tensor) -> Tensor:
    """Compute the loss as TRL's SFTTrainer does: tiles of logits, never all of them."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size
    except ImportError as error:
        raise ValueError(
            "`loss` ('chunked') needs a newer TRL; pip install -U trl, or estimate with 'logits'."
        ) from error
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    # A copy, like the selection of the learned positions there.
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1]).clone()
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    outputs = ("log_probs", "entropy", "is_top1")
    arguments = (ids[:, 1:].reshape(-1), 1.0, chunk_size, softcap, 1.0, outputs)
    log_probs: Tensor = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, *arguments)[0]
    return -log_probs.sum() / len(log_probs)


def _warm_optimizer(trained: list[nn.Parameter], tracker: StorageTracker) -> torch.optim.Optimizer:
    """Return the optimiser with its state, as after the first step."""
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = (value for values in optimizer.state.values() for value in values.values())
    tracker.hold((value for value in state if isinstance(value, Tensor)), "optimizer")
    return optimizer


def _shares(setting: Setting) -> dict[Category, float]:
    """Return the share of what several devices divide that one of them holds."""
    categories: list[Category] = []
    if setting.sharding != "none":
        categories.append("optimizer")
    if setting.sharding not in ("none", "zero1"):
        categories.append("gradients")
    if setting.shares_weights:
        categories += ["weights", "adapter"]
    return dict.fromkeys(categories, 1 / setting.num_gpus)


def _gathered_bytes(model: nn.Module) -> int:
    """Return what is gathered at once where weights are sharded.

    Two blocks, the running one and the one fetched ahead, and what is outside of the blocks.
    """
    blocks = [
        _num_bytes(block)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    return _num_bytes(model) - sum(blocks) + 2 * max(blocks)


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class _FakeResidency(Residency):
    """A Residency over a fake weight; its columns and originals have their real sizes."""

    def find_weight(self) -> Tensor | None:
        """Return the weight: a frozen one, in a run whose memory can be estimated."""
        assert self.parameters is not None
        self.weight = dict.get(self.parameters, "weight")
        return self.weight

    def obstacle(self, update: Any) -> str | None:
        """Tell of what is always forbidden alone."""
        for trained in update.trained():
            trained.num_unversioned = 0  # the number of optimisers that step in a simulated step
        return self.forbidden if self.find_weight() is not None else "no weight"

    _address_of = staticmethod(id)  # there is no memory
    _check_columns = staticmethod(lambda indices, num_columns, what: None)  # nor values


def _materialize(model: nn.Module, setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """Replace every tensor of the meta device by a fake one; call it in a FakeTensorMode.

    Returns what the model holds from now on: weights, and what the adapter adds.
    """
    weights: list[Tensor] = []
    adapter: list[Tensor] = []
    fakes: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, whose id must not come again
    for module in model.modules():
        # Past the guard of adapted layers, which would take the new parameter for a sharded one.
        parameters, buffers = module.__dict__["_parameters"], module.__dict__["_buffers"]
        if is_4bit(module):
            packed, scales = _quantized_weight(module, setting)
            parameters["weight"] = packed
            weights += [packed, *scales]
        for tensors in (parameters, buffers):
            for name, value in list(dict.items(tensors)):
                if value is None or not value.is_meta:
                    continue
                if id(value) not in fakes:
                    fakes[id(value)] = _fake(value, setting), value
                    is_own = setting.row.has_adapter and value.requires_grad
                    (adapter if is_own else weights).append(fakes[id(value)][0])
                dict.__setitem__(tensors, name, fakes[id(value)][0])
    for layer in model.modules():
        if isinstance(layer, PacaLayer) and layer.residency is not None:
            layer.residency = _FakeResidency(layer.get_base_layer())
            # Being fake forbids nothing: it stands for a plain parameter. FSDP2 keeps originals of
            # the two gathered blocks alone: R / I of these, not counted.
            # Nor are columns written into 4 bits, where those are counted by size.
            is_read_only = layer.shares_weight or setting.shares_weights
            is_read_only |= setting.quantization is not None
            layer.residency.forbidden = "its weight is shared" if is_read_only else None
    return weights, adapter


def _fake(value: Tensor, setting: Setting) -> Tensor:
    is_parameter = isinstance(value, nn.Parameter)
    trained = is_parameter and value.requires_grad
    dtype = setting.trained_dtype if trained else value.dtype
    fake = torch.empty_like(value, device="cpu", dtype=dtype, requires_grad=False)
    return nn.Parameter(fake, requires_grad=trained) if is_parameter else fake


def _kept_aside(model: nn.Module) -> list[Tensor]:
    """Write all columns, as a training step before has; return what is kept aside for that.

    The next forward pass writes them again, as after an optimiser step.
    """
    kept: list[Tensor] = []
    for layer in model.modules():
        residency = getattr(layer, "residency", None)
        if not isinstance(layer, PacaLayer) or not isinstance(residency, _FakeResidency):
            continue
        (name,) = layer.r
        residency.write(layer.update_of(name))
        residency.is_stale = residency.is_written
        if residency.kept is not None:
            kept += [residency.kept.originals, residency.kept.columns]
    return kept


def _pack_weights(model: nn.Module, setting: Setting) -> None:
    """Give 4-bit layers of the meta device weights as small as they are when packed."""
    with torch.device("meta"):
        for module in model.modules():
            if is_4bit(module):
                module.weight, _ = _quantized_weight(module, setting)


def _sizes_in_4_bits(model: Any, setting: Setting) -> tuple[int, int]:
    """Return by how many bytes 4-bit weights are smaller, and those of the largest dequantised."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    numbers = [layer.weight.numel() for layer in layers]
    scales = [-(-number // _BLOCK) for number in numbers]
    packed = sum((number + 1) // 2 for number in numbers)
    packed += sum(number + 4 * -(-number // _NESTED_BLOCK) for number in scales)
    less = sum(numbers) * setting.weight_dtype.itemsize - packed
    num_devices = setting.num_gpus if setting.shares_weights else 1
    return less // num_devices, max(numbers) * setting.compute_dtype.itemsize


def _quantized_weight(layer: Any, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """Return an empty packed weight of a 4-bit layer, and the tensors of scales that belong to it.

    Two values are a byte; each 64 have a scale of one byte, each 256 scales one of four bytes.
    """
    from bitsandbytes.functional import QuantState

    shape = torch.Size((layer.out_features, layer.in_features))
    num_scales = -(-shape.numel() // _BLOCK)
    empty = partial(torch.empty, device="cpu")
    packed: Any = nn.Parameter(
        empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
    )
    scales = empty(num_scales, dtype=torch.uint8)
    outer = empty(-(-num_scales // _NESTED_BLOCK))
    code, codes_of_scales, offset = empty(16), empty(256), empty(())
    packed.quant_type, packed.compress_statistics = setting.quantization, True
    packed.quant_state = QuantState(
        absmax=scales,
        shape=shape,
        code=code,
        blocksize=_BLOCK,
        quant_type=setting.quantization,
        dtype=setting.compute_dtype,
        offset=offset,
        state2=QuantState(
            absmax=outer, code=codes_of_scales, blocksize=_NESTED_BLOCK, dtype=torch.float32
        ),
    )
    return packed, [scales, outer, code, codes_of_scales, offset]
