"""Apply a patch to a model in memory, and take it back, bit for bit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from pacatune.grid.columns import put_bits_, read_bits
from pacatune.names import find_name, names_of, nearest
from pacatune.ops.columns import bits
from pacatune.ops.whole import is_shared_out
from pacatune.patch.edit import Patch

_FIX = (
    "Load the model that the patch is for, in that dtype and not quantised; if it holds the "
    "checkpoint's tensors in another form, patch the checkpoint (`pacatune patch apply`)."
)


def apply(model: nn.Module | Mapping[str, Tensor], patch: Patch) -> None:
    """Write a patch's columns into a model's weights, all of them or none.

    The model's own tensors are changed in place; nothing is replaced, so graphs and engines that
    hold them see the patched model. Only the columns move, R/I of the bytes; keep the patch on the
    model's device (`Patch.to`) to move none between devices. Do not call this while another thread
    computes with the model.

    Args:
        model: A plain model, without adapters, or its tensors by their names.
        patch: For its checkpoint.

    Raises:
        ValueError: If a tensor is missing, has another shape, dtype or bits than the patch's base,
            is sharded, quantised or adapted, or if two of the names are one tensor. Nothing has
            been changed then.
    """
    _write(model, patch, "the base's columns.")


def revert(model: nn.Module | Mapping[str, Tensor], patch: Patch) -> None:
    """Write the base's columns back where `apply` has written the patch's; see there.

    Raises:
        ValueError: As for `apply`, and if the model does not hold the patch's columns.
    """
    _write(model, patch.inverse(), "the patch's columns; is it applied?")


@torch.no_grad()
def _write(model: nn.Module | Mapping[str, Tensor], patch: Patch, expected: str) -> None:
    tensors, prefix = tensors_of(model)
    writes = []
    for name, before in patch.before.items():
        weight = find_tensor(tensors, names_of(name, prefix), before.shape, before.form, _FIX)
        here, values = before.to(weight.device), patch.after[name].values
        writes.append((Place(weight, here.dim, here.indices), here.values, values))
    refuse_aliases(
        zip(patch.before, (place.tensor for place, _, _ in writes), strict=True), "the patch"
    )
    # All are compared before any answer of a GPU is waited for.
    answers = [(bits(place.read()) == bits(old)).all() for place, old, _ in writes]
    wrong = [name for name, is_equal in zip(patch.before, answers, strict=True) if not is_equal]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(writes)} tensors, first {wrong[0]!r}, do not hold {expected} "
            "The model is of another base, or was changed; nothing was written."
        )
    with transaction() as put:
        for place, old, new in writes:
            put(place, new, old)


class Place(NamedTuple):
    """Columns of one of a model's tensors, or of some rows of it."""

    tensor: Tensor
    """The parameter itself, or a view of its rows: its version is counted, so a backward pass
    through what was computed with the old columns raises instead of being wrong."""
    dim: int
    indices: Tensor
    """(R,)."""

    def read(self) -> Tensor:
        """Return what is there."""
        return read_bits(self.tensor.detach(), self.dim, self.indices)

    def write(self, columns: Tensor) -> None:
        """Write columns, whose bits are kept."""
        columns = columns.to(self.tensor.device)
        with torch.inference_mode() if self.tensor.is_inference() else torch.no_grad():
            put_bits_(self.tensor, self.dim, self.indices, columns)


@contextmanager
def transaction() -> Iterator[Callable[..., None]]:
    """Give a function that writes columns; a block that fails takes back what it has written."""
    done: list[tuple[Place, Tensor]] = []

    def put(place: Place, columns: Tensor, before: Tensor | None = None) -> None:
        done.append((place, place.read() if before is None else before))
        place.write(columns)

    try:
        yield put
    except BaseException:  # an interrupt, an error of the device
        for place, columns in reversed(done):
            place.write(columns)
        raise


def refuse_aliases(named: Iterable[tuple[str, Tensor]], who: str) -> None:
    """Refuse names of which two are one tensor; `who` changes them."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named:
        if (other := seen.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} are one tensor in this model (tied), and {who} changes "
                "each for itself; untie them first."
            )


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """Return a model's tensors by their names, and the prefix of those that a head came before."""
    if not isinstance(model, nn.Module):
        return model, ""
    unwrap = getattr(model, "get_base_model", None)
    base: nn.Module = unwrap() if callable(unwrap) else model
    tensors: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
    tensors |= dict(base.named_buffers(remove_duplicate=False))
    return tensors, str(getattr(base, "base_model_prefix", ""))


def find_tensor(
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    shape: tuple[int, ...],
    form: str | torch.dtype,
    fix: str,
) -> Tensor:
    """Return the tensor of the first name that a model has; refuse one without such columns."""
    if (name := find_name(names, tensors)) is None:
        refuse_missing(names, tensors, fix)
    tensor = tensors[name]
    if is_shared_out(tensor):
        raise ValueError(
            f"{name!r} is sharded over processes; write before it is, or give a receiver the local "
            "tensors by name (`tensor.to_local()`), `tp_rank` and `tp_size`."
        )
    check_form(name, (tuple(tensor.shape), tensor.dtype), (shape, form), fix)
    if tensor.is_meta:
        raise ValueError(f"{name!r} is on the meta device, without values; load the model first.")
    return tensor


def refuse_missing(names: Sequence[str], tensors: Mapping[str, object], fix: str) -> NoReturn:
    """Refuse a model that has no tensor of any of these names; `fix` says what to do."""
    for name in names:
        owner, _, last = name.rpartition(".")
        if f"{owner}.base_layer.{last}" in tensors:
            raise ValueError(
                f"{owner!r} has an adapter, which keeps columns of its own in the weight or beside "
                "it; unload the adapter first (`model.unload()`), or take the plain model."
            )
    near = nearest(names[0], list(tensors), cutoff=0)
    raise ValueError(f"the model has no tensor {names[0]!r}; the nearest is {near!r}. {fix}")


def check_form(name: str, form: tuple[Any, ...], expected: tuple[Any, ...], fix: str) -> None:
    """Refuse a tensor of another shape or dtype than its columns are for."""
    if form != expected:
        raise ValueError(
            f"{name!r} is {form[0]} in {form[1]}, but the columns are for {expected[0]} in "
            f"{expected[1]}. {fix}"
        )
