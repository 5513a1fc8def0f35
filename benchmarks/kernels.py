"""Count the kernels that a GPU would run, per decoder layer and method; no GPU is needed.

    python -m benchmarks.kernels               writes benchmarks/results/kernels.json

A layer's are those of a model of three layers minus those of a model of two; what counts as a
kernel is in pacatune.measure.kernels. Weights are in bfloat16, adapters in float32 as PEFT makes
them, and the factor alpha / r is 2, so that multiplying by it shows. Counts depend on no clock: the
same versions of torch, transformers and PEFT give the same numbers everywhere.

A whole-tensor pass is one read or one write of an (N, I) or (N, O) tensor beside the large products
and attention: what an adapter costs in memory traffic, whatever the size of the model.

Compiled models are counted by what inductor generates for them: fused kernels, and operators that
it calls. It does so for the CPU here; what it fuses on a GPU may differ.

Sharded models are split by FSDP2, block by block, over two processes, of which one runs: copies
into and out of gathered buffers count, what a network does is left out. Columns go into every
gathered weight anew.

The exit status is 1 if PaCA runs more than is promised here.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.llama import CPU, Shape, make_model
from benchmarks.methods import DROPOUT, OURS, SWAP
from benchmarks.results import Result, counted, new_parser, provenance, quiet_peft
from benchmarks.swap import swap_layers
from pacatune import lean
from pacatune.measure.kernels import Kernel, KernelCounter, branches_of_gpu
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import loss_of, make_batch
from pacatune.reports.rows import Row

RANK, SCALING, SEED = 4, 2, 0
LAYER = Shape(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
NUM_LINEAR = 7
# Divides the size of no weight, which tells what is of tokens.
NUM_TOKENS = 37
_NARROWEST = 32  # the outputs of k_proj and v_proj

# What a PaCA layer may launch beyond a frozen one, per decoder layer of seven linear layers.
PROMISED = {"forward": NUM_LINEAR, "backward": NUM_LINEAR, "accumulating": 2 * NUM_LINEAR}
# A lean MLP takes the columns of its product in backward, in place of forward.
PROMISED_LEAN = {"forward": NUM_LINEAR - 1, "backward": NUM_LINEAR + 1}
PROMISED_LEAN["accumulating"] = PROMISED_LEAN["backward"] + NUM_LINEAR
# Per optimizer step, of a model of any number of layers: one launch beyond steady passes writes the
# columns; after a look at the base, which restores the first weight alone and then the others, they
# are written once more; and the fused optimizer, in which nothing of ours hides.
PROMISED_PER_STEP = {
    "column_write": 0,
    "look": 0,
    "column_write_in_all": 1,
    "look_in_all": 3,
    "optimizer_in_all": 2,
}
_NUM_LAYERS = 3
# What a layer may have beyond a frozen one, per decoder layer. FSDP2 gathers a block for each pass:
# one launch takes its pretrained columns and one writes; two of FSDP2's own take the gradients.
PROMISED_BESIDE = {
    "compiled": {"forward": 1, "backward": 2 * NUM_LINEAR},
    "sharded": {"forward": NUM_LINEAR + 2, "backward": NUM_LINEAR + 4},
}
COMPARED = ("frozen", OURS, "lora")
"""Counted compiled and sharded, too."""

HELD = (OURS,)
"""The lines that promises are about."""

Make = Callable[..., Contender]


def make(
    method: str,
    shape: Shape,
    *,
    quantization: str | None = None,
    groups: int = 1,
    device: torch.device = CPU,
) -> Contender:
    """Return a model of a size, adapted by a method of `pacatune bench`."""
    model = make_model(shape, torch.bfloat16, SEED, quantization, device)
    alpha = SCALING * RANK
    return adapt(
        model,
        method,
        rank=RANK,
        alpha=alpha,
        dropout=DROPOUT,
        seed=SEED,
        targets="all-linear",
        groups=groups,
    )


def _make_swap(shape: Shape, *, device: torch.device = CPU) -> Contender:
    contender = make(OURS, shape, device=device)
    swap_layers(contender.model)
    return contender


# A form of a method that is made in another way is another line, with a function of its own.
MODELS: dict[str, Make] = {
    "frozen": partial(make, "frozen"),
    OURS: partial(make, OURS),
    "paca_g8": partial(make, OURS, groups=8),
    SWAP: _make_swap,
    "lora": partial(make, "lora"),
    "lora_dropout": partial(make, "lora_dropout"),
    "dora": partial(make, "dora"),
    "qpaca": partial(make, "qpaca", quantization="nf4"),
    "qlora": partial(make, "qlora", quantization="nf4"),
}
MEANINGS = {
    "frozen": "forward and input gradients of the frozen model",
    OURS: "ours, columns in the weights",
    "paca_g8": "with 8 row groups",
    SWAP: "columns swapped in and out around every matmul (PEFT 0.22's way)",
    "lora": "PEFT's LoRA",
    "lora_dropout": "with dropout",
    "dora": "PEFT's DoRA",
    "qpaca": "ours on a 4-bit base",
    "qlora": "PEFT's LoRA on a 4-bit base",
}


def passes(contender: Contender, batch: Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the parts of a training run in their order, to be run: kernels are told by their names.

    `forward:` and `backward:` of passes of each kind, and `optimizer` steps.
    """
    model, optimizer = contender.model, contender.optimizer
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(loss_of(model, batch))

    def backward() -> None:
        losses.pop().backward()

    def step() -> None:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def both(kind: str) -> Iterator[tuple[str, Callable[[], None]]]:
        yield f"forward:{kind}", forward
        yield f"backward:{kind}", backward

    yield from both("first")
    yield "optimizer:first", step
    yield from both("written")
    yield from both("accumulating")
    yield "optimizer", step
    yield from both("written again")
    _drop_gradients(model)
    yield from both("steady")
    yield "forward:look", model.zero_grad
    yield from both("look")


def count_steps(contender: Contender) -> list[Kernel]:
    """Run passes of every kind; return their kernels, by phases such as `forward:steady`."""
    batch = make_batch(1, NUM_TOKENS, LAYER.vocab_size, SEED)
    counter = KernelCounter()
    with branches_of_gpu(counter), counter:
        for counter.phase, run in passes(contender, batch):
            run()
    return counter.kernels


def _drop_gradients(model: nn.Module) -> None:
    """Do as `zero_grad`, without a look at the weights."""
    for module in model.modules():
        for parameter in dict.values(module._parameters):
            if parameter is not None:
                parameter.grad = None


def count_layer(make: Make, is_lean: bool) -> dict[str, int]:
    """Return what one decoder layer launches, and what a whole model does per optimizer step."""
    found = []
    for num_layers in (_NUM_LAYERS - 1, _NUM_LAYERS):
        contender = make(dataclasses.replace(LAYER, num_hidden_layers=num_layers))
        if is_lean:
            lean.enable(contender.model, mode="require")
        found.append(_summary(count_steps(contender)))
    fewer, more = found
    of_layer = {name: more[name] - fewer[name] for name in more if name != "optimizer"}
    names = ("column_write", "look", "optimizer")
    return of_layer | {f"{name}_in_all": more[name] for name in names}


def count_sharded(make: Make) -> dict[str, int]:
    """Return what one decoder layer launches in a process group of its own, sharded by FSDP2."""
    found = []
    with _process_group():
        for num_layers in (_NUM_LAYERS - 1, _NUM_LAYERS):
            contender = make(dataclasses.replace(LAYER, num_hidden_layers=num_layers))
            for module in reversed(list(contender.model.modules())):  # blocks before the model
                if isinstance(module, GradientCheckpointingLayer) or module is contender.model:
                    fully_shard(module)
            # FSDP2 has put other parameters in the place of those that the optimizer knows.
            found.append(_summary(count_steps(dataclasses.replace(contender, optimizer=None))))
    fewer, more = found
    return {name: more[name] - fewer[name] for name in ("forward", "backward")}


@contextmanager
def _process_group() -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _summary(kernels: list[Kernel]) -> dict[str, int]:
    def launches(*phases: str) -> int:
        return sum(kernel.launches for kernel in kernels if kernel.phase in phases)

    def num_passes(phase: str) -> int:
        return sum(_num_passes(kernel) for kernel in kernels if kernel.phase == phase)

    steady = launches("forward:steady", "backward:steady")
    return {
        "forward": launches("forward:steady"),
        "backward": launches("backward:steady"),
        "accumulating": launches("backward:accumulating"),
        "column_write": launches("forward:written", "backward:written") - steady,
        "look": launches("forward:look", "backward:look") - steady,
        "optimizer": launches("optimizer"),
        "passes_forward": num_passes("forward:steady"),
        "passes_backward": num_passes("backward:steady"),
    }


def _num_passes(kernel: Kernel) -> int:
    if kernel.kind == "attention" or (kernel.kind == "gemm" and kernel.smallest_side > RANK):
        return 0
    return sum(
        operand.numel % NUM_TOKENS == 0 and operand.numel >= NUM_TOKENS * _NARROWEST
        for operand in (*kernel.reads, *kernel.writes)
    )


def count_compiled(make: Make) -> dict[str, int]:
    """Return the kernels and operators of the code that inductor makes of one decoder layer."""
    found = []
    for num_layers in (_NUM_LAYERS - 1, _NUM_LAYERS):
        model = make(dataclasses.replace(LAYER, num_hidden_layers=num_layers)).model
        found.append([_num_calls(code) for code in _generated_code(model)])
    fewer, more = found
    return {name: more[i] - fewer[i] for i, name in enumerate(("forward", "backward"))}


def _generated_code(model: nn.Module) -> list[str]:
    """Return the code of forward and backward; inputs ask for a gradient, whatever is trained."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, NUM_TOKENS, LAYER.hidden_size, generator=generator).to(torch.bfloat16)
    labels = make_batch(1, NUM_TOKENS, LAYER.vocab_size, SEED)
    compiled = torch.compile(model, fullgraph=True)

    def step() -> None:
        compiled(inputs_embeds=x.requires_grad_(), labels=labels, use_cache=False).loss.backward()

    _, codes = run_and_get_code(step)
    assert len(codes) == 2, f"{len(codes)} graphs"
    return list(codes)


_CALL = re.compile(r"(extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+|\b(cpp_fused|triton_)\w*[.(]).*")


def _num_calls(code: str) -> int:
    """Count the calls of kernels and operators; one may take several lines, its results others."""
    body = code[code.index("def call(") :]
    lines = [line.strip() for line in body.splitlines()]
    return sum(bool(_CALL.search(line)) and not line.startswith(("#", "assert")) for line in lines)


def exceeded_beside(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return what PaCA, compiled or sharded, has beyond what is promised, a sentence each."""
    counts = {row["method"]: row for row in rows}
    return [
        f"{OURS}, {kind}: {counts[OURS][way]} kernels ({way}), "
        f"at most {counts['frozen'][way] + most} promised"
        for way, most in PROMISED_BESIDE[kind].items()
        if counts[OURS][way] > counts["frozen"][way] + most
    ]


def count_each(count: Callable[[Make], dict[str, int]]) -> list[dict[str, Any]]:
    """Return a row for each method that is counted compiled and sharded."""
    return [{"method": method, **count(MODELS[method])} for method in COMPARED]


def exceeded(rows: list[dict[str, Any]]) -> list[str]:
    """Return what PaCA launches beyond what is promised, a sentence each."""
    found = []
    frozen = {row["is_lean"]: row for row in rows if row["method"] == "frozen"}
    for row in rows:
        if row["method"] not in HELD:
            continue
        title = f"{row['method']}, lean" if row["is_lean"] else row["method"]
        most = PROMISED_LEAN if row["is_lean"] else PROMISED
        floor = frozen[row["is_lean"]]
        allowed = {name: floor[name] + number for name, number in most.items()} | PROMISED_PER_STEP
        found += [
            f"{title}: {row[name]} kernels ({name}), at most {most} promised"
            for name, most in allowed.items()
            if row[name] > most
        ]
    return found


def count_all(
    models: Mapping[str, Make], lean_or_not: tuple[bool, ...] = (False, True)
) -> list[dict[str, Any]]:
    """Return a row for each method, lean off and on."""
    return [
        {"method": method, "is_lean": is_lean, **count_layer(make, is_lean)}
        for is_lean in lean_or_not
        for method, make in models.items()
    ]


NAMES = {
    "forward": "forward",
    "backward": "backward",
    "accumulating": "with accumulation",
    "column_write": "write of columns",
    "look": "look at the base",
    "column_write_in_all": "write of columns in all",
    "look_in_all": "look at the base in all",
    "optimizer_in_all": "optimizer in all",
}
"""Key of a count -> what its row is called."""


def rows_of(setting: str, found: list[dict[str, Any]]) -> list[Row]:
    """Return counts as rows of a setting."""
    passes = {"passes_forward": "forward", "passes_backward": "backward"}
    rows = []
    for one in found:
        for names, where in ((NAMES, setting), (passes, "whole-tensor passes")):
            if where == setting or setting == "eager":
                rows += [
                    counted(name, one["method"], one[key], setting=where)
                    for key, name in names.items()
                    if key in one
                ]
    return rows


def main(options: list[str] | None = None) -> int:
    """Count, write the result, and say whether promises are kept."""
    args = new_parser(__doc__).parse_args(options)
    quiet_peft()
    how = (
        f"Per Llama decoder layer (in all: of {_NUM_LAYERS} layers), weights in bfloat16, adapters "
        f"in float32, alpha / r = {SCALING}: counted, not timed, on a CPU that takes a GPU's "
        "branches"
    )
    made = provenance("kernels", how, options)
    found = {"eager": count_all(MODELS, (False,)), "lean": count_all(MODELS, (True,))}
    beside = {"compiled": count_each(count_compiled), "sharded": count_each(count_sharded)}
    problems = [text for rows in found.values() for text in exceeded(rows)]
    problems += [text for kind, rows in beside.items() for text in exceeded_beside(kind, rows)]
    rows = [row for kind, counts in (found | beside).items() for row in rows_of(kind, counts)]
    result = Result(name="kernels", rows=rows, methods=MEANINGS, provenance=made)
    print(f"wrote {result.write(args.output)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    sys.exit(main())
