"""The adapted embedding: R of its D dimensions are trained, for every token.

    y = W[ids]    y[..., indices] += scaling * delta[ids]          delta (V, R)

Only the ids are kept for backward, and the gradient of delta is zero in the rows of tokens that did
not occur; with `sparse=True` it is a sparse tensor of the others. The weight is not written.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.ops.columns import adapted_columns, mixed, widened
from pacatune.ops.whole import is_whole
from pacatune.tuner.additive import AdditiveLayer
from pacatune.tuner.layer import Delta

_OPTIONS = ("padding_idx", "scale_grad_by_freq", "sparse")


class EmbeddingDelta(Delta):
    """Holds one adapter's (V, R) update of an embedding."""

    def forward(self, ids: Tensor, options: dict[str, Any]) -> Tensor:  # type: ignore[override]
        """Return delta[ids], (...) -> (..., C), with the options of the embedding."""
        rows = F.embedding(ids, self.weight, **options)
        if self.mix is None:
            return rows
        return mixed(rows.flatten(0, -2), self.mix).unflatten(0, ids.shape)


class Embedding(AdditiveLayer):
    """An adapted nn.Embedding, or one of transformers' that multiply by `embed_scale`."""

    delta_class = EmbeddingDelta

    @staticmethod
    def check_base(base_layer: Any, name: str) -> None:
        """Refuse embeddings that do more than look up and multiply."""
        if base_layer.max_norm is not None:
            raise ValueError(
                f"Target module {name!r} has `max_norm` ({base_layer.max_norm}): it changes its "
                "weight in each forward pass. Set it to None, or drop the module from "
                "`target_modules`."
            )
        has_own_forward = type(base_layer).forward is not nn.Embedding.forward
        is_plain = list(base_layer._parameters) == ["weight"]
        if has_own_forward and not (is_plain and _scale_of(base_layer) is not None):
            raise TypeError(
                f"Target module {name!r} ({type(base_layer).__name__}) is not supported: it has a "
                "forward of its own. PaCA adapts torch.nn.Embedding and embeddings that multiply "
                "by a number `embed_scale`."
            )

    def _with_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        base: Any = self.get_base_layer()
        indices, scaling = self.paca_indices[name], self.scaling[name]
        own = indices.expand(*x.shape, -1)
        # Not the layer itself, which accelerate would move where it has taken the weight away.
        options = {option: getattr(base, option) for option in _OPTIONS}
        rows, old = self.paca_delta[name](x, options), result.gather(-1, own)
        scale = _scale_of(base)
        if scale is None:
            return result.scatter(-1, own, adapted_columns(old, rows, scaling))
        if is_whole(base.weight, 2):
            columns = base.weight[x.unsqueeze(-1), own]
            rows = widened(adapted_columns(columns, rows, scaling)) - widened(columns)
            scaling = 1.0
        return result.scatter(-1, own, adapted_columns(old, rows * scale, scaling))


def _scale_of(base_layer: Any) -> Any:
    """Return the number that an embedding multiplies by, None if it does not."""
    scale = getattr(base_layer, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return scale.to(base_layer.weight.dtype)  # as Gemma does
    return scale if isinstance(scale, (float, int)) else None  # dynamo knows tuples
