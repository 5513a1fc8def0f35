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

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pacatune.lean import fused
from pacatune.measure.gpu_kernels import allocations_of_gpu

# Beside allocations, whose names begin with `empty` or `new_empty`.
_NO_KERNEL = frozenset(
    ["_unsafe_view", "_reshape_alias", "set_", "resize_", "resize_as_", "detach_", "record_stream"]
)
# A fill and a copy.
_TWO_LAUNCHES = frozenset(["slice_backward", "select_backward", "slice_scatter", "select_scatter"])

# ATen/native/cuda/MultiTensorApply.cuh: elements per chunk, chunks per launch, and tensors per
# launch by the number of lists.
_CHUNK, _MAX_CHUNKS = 65536, 320
_MAX_TENSORS = (110, 64, 48, 36, 30)


class KernelCounter(TorchDispatchMode):
    """Context in which the launches of kernels are counted, under the `phase` that is set.

    On tensors without memory, enter it after their mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.launches: Counter[str] = Counter()
        """Phase -> kernels."""
        self._is_inside = False

    def launch(self, number: int = 1) -> None:
        """Count kernels that no operator stands for."""
        self.launches[self.phase] += number

    def as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, counted as one kernel."""

        def run(*args: Any) -> Any:
            assert not self._is_inside, "a fused function calls another"
            self._is_inside = True
            try:
                result = function(*args)
            finally:
                self._is_inside = False
            self.launch()
            return result

        return run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        is_free = func.is_view or name in _NO_KERNEL or name.startswith(("empty", "new_empty"))
        if not is_free and not self._is_inside:
            arguments = func._schema.arguments
            named = dict(zip([each.name for each in arguments], args, strict=False)) | kwargs
            changed = [
                named.get(each.name)
                for each in arguments
                if each.alias_info is not None and each.alias_info.is_write
            ]
            if any(x.numel() for x in _tensors_in(changed) or _tensors_in(result)):
                self.launch(_num_launches(name, args, named, result))
        return result


def _num_launches(name: str, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> int:
    if name.startswith(("_foreach_", "_fused_")):
        # The steps of a fused optimiser are a list of numbers, which is not cut into chunks.
        lists = [x for x in args if isinstance(x, list | tuple) and _tensors_in(x)]
        num_lists = len(lists) - name.startswith("_fused_") + bool(_tensors_in(result))
        return num_of_multi_tensor([x.numel() for x in _tensors_in(lists[0])], num_lists)
    if name == "gemm_4bit":  # nested scales are dequantised and shifted first
        return 2 if named.get("absmax_8bit") is None else 4
    if name in _TWO_LAUNCHES:
        return 2
    is_added = name in ("addmm", "baddbmm") and named.get("beta", 1) != 0 and args[0].dim() > 1
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
