"""Where the trained columns of a weight are: the only code that reads and writes them there.

A linear layer's weight is (O, I). A convolution's kernel is (O, I/G, *k). With one group, input
channel i is column i, as in a linear layer. With G groups it is column i mod I/G of the rows of
group i // (I/G), and of no others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Size = int | Sequence[int]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Number of spatial dimensions -> the convolution.
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def check_columns(indices: Tensor, num_columns: int | None, what: str) -> None:
    """Refuse what cannot be columns of a weight, which a GPU would read and write beside it.

    They are int64, sorted and unique. Values on the meta device are not looked at. A GPU waits for
    this once.

    Args:
        indices: (R,).
        num_columns: I; None where nobody knows.
        what: Begins the message.

    Raises:
        ValueError: If they are anything else.
    """
    if indices.dtype != torch.int64:
        raise ValueError(
            f"{what} has dtype {indices.dtype}; it must be torch.int64. Convert it with `.long()` "
            "and save it again."
        )
    if indices.is_meta:
        return
    wrong = F.pad(indices, (1, 0), value=-1)[..., :-1] >= indices
    if num_columns is not None:
        wrong |= indices >= num_columns
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        end = "on" if num_columns is None else f"to {num_columns - 1}"
        raise ValueError(
            f"{what} holds {int(indices[place])} at position {place[-1]}; column numbers must be "
            f"sorted and unique, from 0 {end}. The file is damaged, or made for another base model."
        )


def check_form(indices: Tensor) -> None:
    """Refuse what has not the form of columns; their values are not looked at."""
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be (R,) int64, got shape {tuple(indices.shape)} of {indices.dtype}."
        )


def read_columns(weight: Tensor, indices: Tensor, groups: int = 1, *, dim: int = 1) -> Tensor:
    """Return what a weight holds in some columns, a kernel for some input channels.

    Args:
        weight: (O, I/G, *k), or (O, I) of a linear layer.
        indices: (R,) of the I columns or input channels.
        groups: G.
        dim: Dimension of the columns.

    Returns:
        (O/G, R, *k): entry [o, j] leads from channel indices[j] to output o of its group. Other
        weights with R in place of I.
    """
    if groups == 1:
        return weight.index_select(dim, indices)
    per_group = weight.shape[1]
    grouped: Tensor = weight.unflatten(0, (groups, -1))
    return grouped[indices // per_group, :, indices % per_group].transpose(0, 1)


def columns_of_kernel(weight: Tensor, groups: int = 1) -> Tensor:
    """Return a kernel as a matrix with a column for each input channel.

    Args:
        weight: (O, I/G, *k).
        groups: G.

    Returns:
        (O/G * prod(k), I); a copy, unless the kernel has one tap and one group.
    """
    grouped: Tensor = weight.unflatten(0, (groups, -1)).flatten(3)
    return grouped.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def put_columns_(
    weight: Tensor, indices: Tensor, columns: Tensor, groups: int = 1, *, dim: int = 1
) -> None:
    """Write what `read_columns` reads, in the dtype of `weight`, into `weight` itself."""
    if groups == 1 and weight.is_cpu:  # twice as fast there as the next
        weight[(slice(None),) * dim + (indices,)] = columns
        return
    if groups == 1:
        weight.index_copy_(dim, indices, columns)
        return
    per_group = weight.shape[1]
    grouped = weight.unflatten(0, (groups, -1))
    grouped[indices // per_group, :, indices % per_group] = columns.transpose(0, 1)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits as whole numbers, in the same memory."""
    return tensor.view(_INTEGERS[tensor.itemsize])


def with_columns(weight: Tensor, indices: Tensor, columns: Tensor) -> Tensor:
    """Return an (O, I) weight with other (O, R) columns, as a new tensor."""
    return weight.index_copy(1, indices, columns)


def adapted_columns(columns: Tensor, delta: Tensor, scaling: float) -> Tensor:
    """Return W + scaling * delta in the dtype of W: the bits that every path has for W'.

    Added in float32 at least, and rounded once: in 16 bits, devices round the factor differently.

    Args:
        columns: (O, R) of the pretrained weight, or other columns in its layout.
        delta: Their trained update, any floating dtype.
        scaling: alpha / R.
    """
    return torch.add(columns, widened(delta), alpha=scaling).to(columns.dtype)


class Update(NamedTuple):
    """What is trained of a weight: some columns of W' are those of W and scaling * delta.

    With `mix` they are those of W and scaling * delta mix: C columns whose update has rank R.
    Without it C is R, and each column has an update of its own.
    """

    delta: Any
    """(O, R), of any floating dtype; (O/G, R, *k) of convolutions, (E, O, R) of E experts."""
    indices: Tensor
    """(C,) int64, the trained columns, sorted."""
    scaling: float
    """alpha / R."""
    mix: Any = None
    """(R, C), (E, R, C) of experts, or (R, C, *k) of convolutions, whose delta is then (O/G, R)."""

    def trained(self) -> tuple[Any, ...]:
        """Return what gradients are of."""
        return (self.delta,) if self.mix is None else (self.delta, self.mix)

    def dense(self) -> Any:
        """Return the (O, C) update of the columns before scaling, the one that every path has."""
        return self.delta if self.mix is None else mixed(self.delta, self.mix)

    def plain(self) -> "Update":
        """Return the same update without mix."""
        return self if self.mix is None else Update(self.dense(), self.indices, self.scaling)

    def adapted(self, columns: Tensor) -> Tensor:
        """Return the columns of W', given those of W."""
        delta = self.delta if self.mix is None else mixed(self.delta, self.mix)
        return adapted_columns(columns, delta, self.scaling)


def mixed(delta: Tensor, mix: Tensor) -> Tensor:
    """Return delta mix, in float32 at least: what an update of low rank adds to its columns.

    Formed in float64 where the device has it, and rounded to float32: neither the order of sums,
    which differs by device and shape, nor TF32 changes a bit of W', but for ties.

    Args:
        delta: (O, R), (O/G, R) or (E, O, R).
        mix: (R, C), (R, C, *k) or (E, R, C).

    Returns:
        (O, C), (O/G, C, *k) or (E, O, C).
    """
    wide = torch.float64 if delta.device.type in ("cpu", "cuda") else torch.float32
    dtype = torch.promote_types(torch.promote_types(delta.dtype, mix.dtype), torch.float32)
    product = torch.matmul(delta.to(wide), mix.to(wide).flatten(delta.dim() - 1)).to(dtype)
    return product.unflatten(-1, mix.shape[delta.dim() - 1 :])


def widened(x: Tensor) -> Tensor:
    """Return it in float32 at least, which sums and products of 16 bits are formed in."""
    return x.float() if x.itemsize < 4 else x


def adapted_kernel(
    weight: Tensor,
    update: Update,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Return W' as a new tensor; autograd can go through it.

    Args:
        weight: (O, I/G, *k) pretrained kernel.
        update: Of R of the I input channels.
        groups: G.
        dtype: Dtype of the result; that of `weight` by default. The sum is rounded to the dtype of
            `weight` in any case, as a merge would.
        memory_format: Memory format of the result.
    """
    dtype = dtype or weight.dtype
    columns = update.adapted(read_columns(weight, update.indices, groups))
    kernel = weight.to(dtype, copy=True, memory_format=memory_format)
    put_columns_(kernel, update.indices, columns.to(dtype), groups)
    return kernel


def select_channels(x: Tensor, indices: Tensor, num_dims: int) -> Tensor:
    """Return x[..., indices, *positions] in the memory order of x.

    Args:
        x: (B, I, *positions) or (I, *positions).
        indices: (R,) input channels.
        num_dims: Number of spatial dimensions.
    """
    dim = x.dim() - num_dims - 1
    # Channels last: index_select would return another order. A compiler chooses orders by itself,
    # and torch 2.6's lets no backward pass ask for them.
    if not torch.compiler.is_compiling() and x.stride(dim) == 1:
        return x.movedim(dim, -1).index_select(-1, indices).movedim(-1, dim)
    return x.index_select(dim, indices)


def conv_of_columns(
    columns: Tensor,
    kernel: Tensor,
    indices: Tensor,
    in_channels: int,
    groups: int,
    convolve: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Return what trained channels add to a convolution's output, by plain operations.

    For whatever leaves the convolution itself to others: hooks, compiled graphs, several adapters.

    Args:
        columns: (B, R, *positions) or (R, *positions), the trained channels of x.
        kernel: (O/G, R, *k) scaled update.
        indices: (R,) of the I input channels.
        in_channels: I.
        groups: G.
        convolve: The convolution without its bias: takes input, kernel and number of groups.

    Returns:
        (B, O, *positions) or (O, *positions).
    """
    if groups == 1:
        return convolve(columns, kernel, 1)
    each = convolve(columns, one_group_each(kernel), len(indices))
    dim = each.dim() - kernel.dim() + 1
    shape = list(each.shape)
    shape[dim] = groups * len(kernel)
    outputs = outputs_of(indices, in_channels // groups, len(kernel))
    return each.new_zeros(shape).index_add(dim, outputs, each)


def one_group_each(kernel: Tensor) -> Tensor:
    """Return (O/G, R, *k) as the (R * O/G, 1, *k) kernel of a convolution with R groups."""
    return kernel.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def outputs_of(indices: Tensor, in_per_group: int, out_per_group: int) -> Tensor:
    """Return the outputs that input channels lead to: all those of their group.

    Args:
        indices: (R,) input channels.
        in_per_group: I/G.
        out_per_group: O/G.

    Returns:
        (R * O/G,) output channels, those of each input channel together.
    """
    first = indices // in_per_group * out_per_group
    return (first.unsqueeze(1) + torch.arange(out_per_group, device=indices.device)).flatten()
