"""Columns from a trainer into a running SGLang, through its `update_weights_from_tensor`.

SGLang calls a function of ours in its workers for tensors that are sent with its name as
`load_format`, if it was started with `custom_weight_loader=["pacatune.integrations.sglang.load"]`.
Written from SGLang 0.5.23's source, and not run with it; docs/vllm.md says how to use it.
"""

import json
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pacatune.sync.message import Columns, Positions, from_wire, to_wire
from pacatune.sync.receiver import ColumnReceiver

LOADER = "pacatune.integrations.sglang.load"
"""For SGLang's `custom_weight_loader` and `load_format`."""

_receivers: "WeakKeyDictionary[nn.Module, ColumnReceiver]" = WeakKeyDictionary()


def named_tensors(message: Positions | Columns) -> list[tuple[str, Tensor]]:
    """Return a message as `update_weights_from_tensor` takes it: one tensor, named by its words."""
    words, buffer = to_wire(message)
    return [(json.dumps(words), buffer)]


def load(model: nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Write columns into SGLang's model, in place; called by SGLang, on each rank.

    Args:
        model: A rank's part of the model.
        named_tensors: What `named_tensors` returns.

    Raises:
        ValueError: If they do not fit; nothing was written then.
    """
    receiver = _receivers.get(model)
    if receiver is None:
        rank, size = _tensor_parallel_rank()
        receiver = _receivers[model] = ColumnReceiver(model, tp_rank=rank, tp_size=size)
    for words, buffer in named_tensors:
        message = from_wire(json.loads(words), buffer)
        if isinstance(message, Positions):
            receiver.expect(message)
        else:
            receiver.apply(message)


def _tensor_parallel_rank() -> tuple[int, int]:
    try:
        from sglang.srt import distributed
    except ImportError:  # a plain model
        return 0, 1
    rank = distributed.get_tensor_model_parallel_rank()
    return rank, distributed.get_tensor_model_parallel_world_size()
