"""Training steps of every method, in turns, beside a frozen model: numbers, not promises.

Eight layers of LLaMA3-8B's size in bfloat16; on a CPU a tiny model, whose times say nothing.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import QUANTISED
from benchmarks.lean import LAYER
from benchmarks.methods import OURS, SWAP, make_contender
from benchmarks.models import loss_of_graph, make_batch
from benchmarks.results import compare, take_turns
from benchmarks.timing import Step

pytestmark = pytest.mark.gpu
METHODS = ("frozen", OURS, SWAP, "lora", "lora_dropout", "dora")
BATCHES = ((2, 512), (8, 512), (1, 8192))
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": 2, "num_key_value_heads": 2}


def measure(device, methods, batches, adapter_dtype=torch.bfloat16, **options):
    """Return rows; options are those of `Step`."""
    is_gpu = device.type == "cuda"
    values = LAYER | ({"num_hidden_layers": 8} if is_gpu else SMALL)
    contenders = {
        method: make_contender(
            method, values, torch.bfloat16, 0, device, adapter_dtype=adapter_dtype
        )
        for method in methods
    }
    if "loss" in options:
        for contender in contenders.values():
            backend = "inductor" if is_gpu else "eager"
            contender.model.compile(dynamic=False, backend=backend)
    rows, how = [], SimpleNamespace(seconds=8.0 * is_gpu, min_rounds=3, warmup=3)
    for size in batches if is_gpu else [(1, 16)]:
        batch = make_batch(*size, values["vocab_size"], 0).to(device)
        steps = {n: Step(contender=c, batch=batch, **options) for n, c in contenders.items()}
        turns = take_turns({name: step.seconds for name, step in steps.items()}, how)
        rows += compare(turns, 0, setting=f"{size[0]} x {size[1]} tokens")
    return [row.to_dict() for row in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_of_all_methods(device, record_property, dtype):
    methods = [*METHODS, *(QUANTISED if find_spec("bitsandbytes") is not None else ())]
    options = {} if dtype == torch.bfloat16 else {"autocast": torch.bfloat16}
    record_property("rows", measure(device, methods, BATCHES, dtype, **options))


def test_steps_of_compiled_models(device, record_property):
    methods = ("frozen", OURS, "lora")
    record_property("rows", measure(device, methods, BATCHES[:1], loss=loss_of_graph))
