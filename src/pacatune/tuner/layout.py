"""How each kind of weight holds the columns that are trained: one class for each kind.

A `Layout` knows the sizes of one weight and where its columns are: in the weight, in the update of
a layer, in the update of an adapter's file, and in the layer's input. What is computed with them is
the layers' matter (`tuner.linear`, ...). The symbols are those of docs/method.md.

    kind                weight             update in a layer    in a file
    linear              (O, I)             (O, R)               (O, R)
    Conv1D              (I, O)             (O, R)               (O, R)
    convolution         (O, I/G, *k)       (O/G, R, *k)         (O/G, R, *k)
    embedding           (V, D)             (V, R)               (V, R)
    experts             (E, O, I) or       (E, O, R)            (O, R, E)
                        (E, I, O)
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.ops.columns import adapted_columns, columns_of_kernel, put_columns_, read_columns
from pacatune.ops.whole import whole_shape
from pacatune.tuner.compat import resolve_quantization_backend


@dataclass(frozen=True)
class Layout:
    """A linear layer's weight, (O, I), quantised or not."""

    out_features: int
    in_features: int
    """Number of columns to choose from."""

    title: ClassVar[str] = "torch.nn.Linear"
    """What messages call the kind."""
    word: ClassVar[str] = "linear layer"
    """In one word, or two."""
    delta_dim: ClassVar[int] = 1
    """Dimension of the columns in a layer's update."""

    @classmethod
    def of(cls, module: Any, parameter_name: str) -> "Layout":
        """Return the layout of a module's weight, the whole of one that is split."""
        if isinstance(module, nn.Linear):
            return cls(module.out_features, module.in_features)
        in_features, out_features = cast("tuple[int, int]", _get_in_out_features(module))
        return cls(out_features, in_features)

    @property
    def weight_dim(self) -> int:
        """Dimension of the columns in the weight."""
        return 1

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of an update in a file if every column were trained."""
        return self.delta_shape(self.in_features)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight, output features before columns."""
        return self.delta_shape(self.in_features)

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """Return the shape of a layer's update of `r` columns."""
        return self.out_features, r

    def factor_shapes(self, r: int, num_trained: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of delta and mix, the factors of an update of rank `r`."""
        return self.delta_shape(r), (r, num_trained)

    def check(self, r: int, name: str) -> None:
        """Refuse a rank that the weight, of the module of that name, has not the columns for."""
        if r > self.in_features:
            raise ValueError(
                f"`r` ({r}) must be in [1, in_features={self.in_features}] for {name!r}; lower it, "
                f"set `rank_pattern`, or drop {name!r} from `target_modules`."
            )

    def from_file(self, delta: Tensor) -> Tensor:
        """Return an update of a file as a layer holds it."""
        return delta

    def oriented(self, delta: Tensor) -> Tensor:
        """Turn an update from a layer's order of dimensions to the weight's, or back."""
        return delta

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight, or its gradient, as a matrix whose columns are those of the paper.

        Returns:
            (O, I) of linear layers, (V, D) of embeddings, (E * O, I) of E experts, and
            (O/G * taps, I) of convolutions: all that leads from an input channel into its group.
        """
        return weight

    def first_matrix(self, weight: Tensor) -> Tensor:
        """Return the same of the first of many experts."""
        return self.matrix(weight)

    def read_columns(self, weight: Tensor, indices: Tensor) -> Tensor:
        """Return some columns of a weight, in its order of dimensions.

        Args:
            weight: In the module's own layout.
            indices: (R,) columns, on the weight's device.
        """
        return read_columns(weight, indices, dim=self.weight_dim)

    def put_columns_(self, weight: Tensor, indices: Tensor, columns: Tensor) -> None:
        """Write what `read_columns` reads, into `weight` itself."""
        put_columns_(weight, indices, columns, dim=self.weight_dim)

    def adapted(self, columns: Tensor, delta: Tensor, scaling: float) -> Tensor:
        """Return the columns of W', of those that W has, and a layer's update of them."""
        return adapted_columns(columns, self.oriented(delta), scaling)

    @property
    def why_no_columns(self) -> str | None:
        """Say why the trained columns are no columns of the weight's tensor; None: they are."""
        return None


@dataclass(frozen=True)
class Conv1DLayout(Layout):
    """The weight of transformers' Conv1D, (I, O)."""

    title: ClassVar[str] = "transformers' Conv1D"

    @property
    def weight_dim(self) -> int:
        """That of I."""
        return 0

    def oriented(self, delta: Tensor) -> Tensor:
        """Transpose."""
        return delta.t()

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (O, I)."""
        return weight.t()


@dataclass(frozen=True)
class ConvolutionLayout(Layout):
    """A convolution's kernel, (O, I/G, *k): its columns are input channels."""

    groups: int = 1
    kernel_size: tuple[int, ...] = ()

    title: ClassVar[str] = "torch.nn.Conv1d, Conv2d, Conv3d"
    word: ClassVar[str] = "convolution"

    @classmethod
    def of(cls, module: Any, parameter_name: str) -> "ConvolutionLayout":
        """Read sizes only."""
        return cls(module.out_channels, module.in_channels, module.groups, module.kernel_size)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(O, I/G, *k)."""
        return self.out_features, self.in_features // self.groups, *self.kernel_size

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """Return (O/G, r, *k)."""
        return self.out_features // self.groups, r, *self.kernel_size

    def factor_shapes(self, r: int, num_trained: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (O/G, r) and (r, C, *k), as LoRA's."""
        return (self.out_features // self.groups, r), (r, num_trained, *self.kernel_size)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (O/G * taps, I)."""
        return columns_of_kernel(weight, self.groups)

    def read_columns(self, weight: Tensor, indices: Tensor) -> Tensor:
        """Return (O/G, R, *k)."""
        return read_columns(weight, indices, self.groups)

    def put_columns_(self, weight: Tensor, indices: Tensor, columns: Tensor) -> None:
        """Write (O/G, R, *k)."""
        put_columns_(weight, indices, columns, self.groups)

    @property
    def why_no_columns(self) -> str | None:
        """Those of a convolution with several groups lead to the outputs of their own alone."""
        return f"a convolution with groups={self.groups}" if self.groups > 1 else None


@dataclass(frozen=True)
class EmbeddingLayout(Layout):
    """An embedding's weight, (V, D): its columns are the D dimensions, its outputs the V tokens."""

    title: ClassVar[str] = "torch.nn.Embedding"
    word: ClassVar[str] = "embedding"

    @classmethod
    def of(cls, module: Any, parameter_name: str) -> "EmbeddingLayout":
        """Read sizes only."""
        return cls(module.num_embeddings, module.embedding_dim)


@dataclass(frozen=True)
class ExpertsLayout(Layout):
    """One weight of all experts, (E, O, I), or (E, I, O): all train the same columns."""

    num_experts: int = 1
    is_transposed: bool = False

    word: ClassVar[str] = "weights of experts"
    delta_dim: ClassVar[int] = 2

    @classmethod
    def of(cls, module: Any, parameter_name: str) -> "ExpertsLayout":
        """Read sizes only."""
        parameter = getattr(module, parameter_name)
        first, second, third = whole_shape(parameter)
        if is_transposed(module):
            return cls(third, second, first, True)
        return cls(second, third, first, False)

    @property
    def weight_dim(self) -> int:
        """That of I."""
        return 1 if self.is_transposed else 2

    @property
    def file_shape(self) -> tuple[int, ...]:
        """(O, I, E)."""
        return self.out_features, self.in_features, self.num_experts

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """Return (E, O, r)."""
        return self.num_experts, self.out_features, r

    def factor_shapes(self, r: int, num_trained: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (E, O, r) and (E, r, C)."""
        return self.delta_shape(r), (self.num_experts, r, num_trained)

    def from_file(self, delta: Tensor) -> Tensor:
        """Return (O, R, E) as (E, O, R)."""
        return delta.permute(2, 0, 1)

    def oriented(self, delta: Tensor) -> Tensor:
        """Transpose each expert's, where its weight is."""
        return delta.transpose(1, 2) if self.is_transposed else delta

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (E * O, I)."""
        return self.oriented(weight).flatten(0, 1)

    def first_matrix(self, weight: Tensor) -> Tensor:
        """Return (O, I)."""
        return self.oriented(weight[:1])[0]


# Kinds of modules that `target_modules` can name.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], type[Layout]], ...] = (
    ((nn.Linear,), Layout),
    ((Conv1D,), Conv1DLayout),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvolutionLayout),
    ((nn.Embedding,), EmbeddingLayout),
)
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def _kind_of(module: nn.Module) -> type[Layout] | None:
    return next((layout for kinds, layout in _KINDS if isinstance(module, kinds)), None)


def layout_of(module: Any, parameter_name: str = "weight") -> Layout | None:
    """Return the layout of a weight that an adapter can have, None if there is none.

    Only sizes are read: quantised linear layers are known by in_features and out_features.
    """
    kind = _kind_of(module)
    if parameter_name != "weight":
        is_known = parameter_name in _EXPERT_PARAMETERS and has_known_experts(module)
        return ExpertsLayout.of(module, parameter_name) if is_known else None
    if kind is not None:
        return kind.of(module, parameter_name)
    out_features = getattr(module, "out_features", None)
    in_features = getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return Layout(out_features, in_features)
    return None


def has_layout(module: nn.Module) -> bool:
    """Whether a module is of an unquantised kind that `target_modules` may name."""
    return _kind_of(module) is not None


def adaptable_kind(module: nn.Module, **kwargs: Any) -> type[Layout] | None:
    """Return the kind of a module that `target_modules` may name, None if it cannot be adapted."""
    if resolve_quantization_backend(module, **kwargs) is not None:
        return Layout
    return _kind_of(module)


def supported_kinds() -> str:
    """Return the names of all kinds, for messages."""
    names = ", ".join(layout.title for _, layout in _KINDS)
    return f"{names}, quantised linear layers and, as `target_parameters`, the weights of experts"


def has_known_experts(module: nn.Module) -> bool:
    """Whether this is an experts module whose forward we know.

    Those that run on transformers' interface say how it goes (`has_gate`, `is_transposed`, ...): to
    transformers' own implementations, and to ours.
    """
    return "has_gate" in module.__dict__ or takes_all_tokens(module)


def is_transposed(experts: Any) -> bool:
    """Whether the weights are (E, I, O)."""
    return takes_all_tokens(experts) or bool(experts.is_transposed)


def takes_all_tokens(experts: nn.Module) -> bool:
    """Whether each expert gets every token, zeros in place of those routed elsewhere: Llama 4."""
    return type(experts).__name__ == "Llama4TextExperts"
