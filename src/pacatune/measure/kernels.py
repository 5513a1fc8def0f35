"""Counts the kernels that a GPU would run, on a machine without one.

PyTorch's eager mode launches a kernel per operator that computes or moves something, whatever the
device. So the operators of a step on the CPU, or on tensors without memory, are those of a GPU,
once the few branches that ask for the device go the other way (`branches_of_gpu`).

What is counted as what:

    views, allocations, no elements      nothing
    attention                            one each way
    _foreach_* and fused optimisers      the launches of CUDA's multi_tensor_apply
    addmm that adds a matrix             two: a copy of it, and the product
    the backward of a slice              two: a fill, and a copy
    functions fused by pacatune.lean     one
    bitsandbytes' 4-bit product          what it does for many tokens: dequantise, multiply

Kernels that a library launches within one operator (split sums, the parts of attention's backward)
are not seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pacatune.lean import fused
from pacatune.measure.counters import flop_formulas
from pacatune.measure.gpu_kernels import allocations_of_gpu
from pacatune.measure.tracker import storage_key

Kind = Literal["gemm", "attention", "elementwise"]

# Beside allocations, whose names begin with `empty` or `new_empty`.
_NO_KERNEL = frozenset(
    ["_unsafe_view", "_reshape_alias", "set_", "resize_", "resize_as_", "detach_", "record_stream"]
)
# Read as much of their first tensor as they return; write as much of it as they are given.
_GATHERS = frozenset(["index_select", "embedding", "gather", "index", "take"])
_SCATTERS = frozenset(
    ["index_copy_", "index_add_", "index_put_", "put_", "scatter_", "scatter_add_"]
)
# What they change in place they do not read.
_OVERWRITES = frozenset(
    ["copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_"]
)

# A fill and a copy.
_TWO_LAUNCHES = frozenset(["slice_backward", "select_backward", "slice_scatter", "select_scatter"])

# ATen/native/cuda/MultiTensorApply.cuh: elements per chunk, chunks per launch, and tensors per
# launch by the number of lists.
_CHUNK, _MAX_CHUNKS = 65536, 320
_MAX_TENSORS = (110, 64, 48, 36, 30)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator of a step, as a GPU runs it."""

    name: str
    kind: Kind
    phase: str
    """What the counter's `phase` was."""
    launches: int
    reads: tuple[int, ...]
    """Elements that it reads, of each tensor."""
    writes: tuple[int, ...]
    smallest_side: int
    """The smallest size of the matrices that are multiplied; 0 if there are none."""


class KernelCounter(TorchDispatchMode):
    """Context in which every kernel is noted in `kernels`, under the `phase` that is set.

    On tensors without memory, enter it after their mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.kernels: list[Kernel] = []
        # Of a function that is one kernel: how much it reads of each storage.
        self._inner: dict[int, int] | None = None
        self._products = flop_formulas().keys()

    def launch(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Note a kernel that no operator stands for; those of products end in `mm`."""
        is_product = name.endswith("mm")
        self._add(name, is_product, [(x, _size(x)) for x in reads], [_size(x) for x in writes])

    def as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, counted as one kernel that reads its tensors and writes its results.

        Of a tensor it reads what the operators in it read.
        """

        def run(*args: Any) -> Any:
            assert self._inner is None, "a fused function calls another"
            self._inner = {}
            try:
                result = function(*args)
            finally:
                inner, self._inner = self._inner, None
            given = {storage_key(x): x for x in _tensors_in(args)}
            reads = [(x, inner[key]) for key, x in given.items() if key in inner]
            self._add(function.__name__, False, reads, [_size(x) for x in _tensors_in(result)])
            return result

        return run

    def _add(
        self,
        name: str,
        is_product: bool,
        reads: list[tuple[Tensor, int]],
        writes: list[int],
        launches: int = 1,
    ) -> None:
        if self._inner is not None:
            for tensor, size in reads:
                key = storage_key(tensor)
                self._inner[key] = max(size, self._inner.get(key, size))
            return
        kind: Kind = "attention" if "attention" in name else "gemm" if is_product else "elementwise"
        sides = [min(x.shape[-2:]) for x, _ in reads if x.dim() >= 2] if kind == "gemm" else []
        sizes = tuple(size for _, size in reads), tuple(writes)
        self.kernels.append(Kernel(name, kind, self.phase, launches, *sizes, min(sides, default=0)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, name = func._schema.name.split("::")
        if func.is_view or name in _NO_KERNEL or name.startswith(("empty", "new_empty")):
            return result
        if (namespace, name) == ("bitsandbytes", "gemm_4bit"):
            self._note_4bit(func, args, kwargs, result)
        else:
            self._note(func, name, args, kwargs, result)
        return result

    def _note(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        read, changed = _arguments(func, name, args, kwargs)
        written = changed or _tensors_in(result)
        if not any(x.numel() for x in written):
            return
        reads = [(x, _size(x)) for x in read]
        writes = [_size(x) for x in written]
        if name in _GATHERS:
            reads[0] = read[0], writes[0]
        elif name in _SCATTERS:
            # The changed tensor is listed first; what is written into it, last.
            reads, writes = reads[1:], [read[-1].numel()]
        is_product = func._overloadpacket in self._products
        self._add(name, is_product, reads, writes, _num_launches(name, args, kwargs, result))

    def _note_4bit(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        """Note what bitsandbytes' product does on a GPU for more than some hundred tokens."""
        names = [argument.name for argument in func._schema.arguments]
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        x, packed, scales = given["A"], given["B"], given["absmax"]
        if given.get("absmax_8bit") is not None:
            nested = given["absmax_8bit"]
            scales = torch.empty_like(nested, dtype=torch.float32)
            self.launch("dequantize_blockwise", (nested,), (scales,))
            self.launch("add_", (scales,), (scales,))
        weight = x.new_empty(given["shapeB"])
        self.launch("dequantize_4bit", (packed, scales), (weight,))
        self.launch("mm", (x, weight), (result,))


def _arguments(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator reads, and those that it changes."""
    read: list[Tensor] = []
    changed: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = _tensors_in(value)
        if argument.alias_info is None or not argument.alias_info.is_write:
            read += tensors
            continue
        changed += tensors
        if name not in _OVERWRITES and not argument.is_out:
            read += tensors
    return read, changed


def _num_launches(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if name.startswith(("_foreach_", "_fused_")):
        # The steps of a fused optimiser are a list of numbers, which is not cut into chunks.
        lists = [x for x in args if isinstance(x, list | tuple) and _tensors_in(x)]
        num_lists = len(lists) - name.startswith("_fused_") + bool(_tensors_in(result))
        return num_of_multi_tensor([x.numel() for x in _tensors_in(lists[0])], num_lists)
    if name in _TWO_LAUNCHES:
        return 2
    is_added = name in ("addmm", "baddbmm") and kwargs.get("beta", 1) != 0 and args[0].dim() > 1
    return 2 if is_added else 1


def num_of_multi_tensor(sizes: Sequence[int], num_lists: int) -> int:
    """Return how often CUDA's multi_tensor_apply launches for lists of tensors of these sizes."""
    launches = tensors = chunks = 0
    most = _MAX_TENSORS[min(num_lists, len(_MAX_TENSORS)) - 1]
    for size in sizes:
        left = -(-size // _CHUNK)
        tensors += bool(left)
        while left:
            taken = min(left, _MAX_CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == _MAX_CHUNKS or (tensors == most and not left):
                launches, chunks = launches + 1, 0
                tensors = bool(left)  # what is left of this one comes along
    return launches + bool(chunks)


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _size(x: Tensor) -> int:
    """Return how many elements a tensor has; an expanded one is as large as its memory."""
    return min(x.numel(), x.untyped_storage().nbytes() // x.itemsize)


@contextmanager
def branches_of_gpu(counter: KernelCounter) -> Iterator[None]:
    """Let our code and its libraries take the ways on the CPU that they take on a GPU.

    Stand-ins compute no values: use it to count, not to train.
    """
    with (
        allocations_of_gpu(counter.launch),
        patch.object(fused, "_is_wanted", lambda x: True),
        patch.object(fused, "_compiled", counter.as_one),
    ):
        yield
