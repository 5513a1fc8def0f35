"""Count the kernels that a GPU would run, per decoder layer and method; no GPU is needed.

    python -m benchmarks.kernels               writes benchmarks/results/kernels.json

A layer's are those of a model of three layers minus those of a model of two; what counts as a
kernel is in kernel_counter.py. Weights are in bfloat16, adapters in float32 as PEFT makes
them, passes run under autocast as Trainer's do, and the factor alpha / r is 2, so that multiplying
by it shows. Counts depend on no clock: the same versions of torch, transformers and PEFT give the
same numbers everywhere.

Sharded models are split by FSDP2, block by block, over two processes, of which one runs: copies
into and out of gathered buffers count, what a network does is left out. Columns go into every
gathered weight anew.

The exit status is 1 if PaCA runs more than is promised here.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.kernel_counter import KernelCounter, branches_of_gpu
from benchmarks.methods import CPU, OURS, SWAP, make_contender
from benchmarks.models import llama_values, loss_of, make_batch
from benchmarks.results import counted, new_parser, record
from benchmarks.timing import Contender
from pacatune import lean
from pacatune.reports.rows import Row

RANK, SCALING, SEED = 16, 2, 0
LAYER = llama_values(128, 2, num_heads=4, num_kv_heads=2, intermediate_size=192, vocab_size=64)
NUM_LINEAR = 7
NUM_TOKENS = 37
_NUM_LAYERS = 3

QUANTISED = ("qpaca", "qlora")
RIVALS = (SWAP, "lora", "lora_bf16", "lora_dropout", "dora")
COUNTED = ("frozen", OURS, "channels", *RIVALS, *QUANTISED)
HELD = ("frozen", OURS)
"""Those that promises are about: ours, beyond the floor."""

FORWARD, BACKWARD, ACCUMULATING = "forward", "backward", "with accumulation"
# What a PaCA layer may launch beyond a frozen one, per decoder layer of seven linear layers.
PROMISED = {
    "eager": {FORWARD: NUM_LINEAR, BACKWARD: NUM_LINEAR, ACCUMULATING: 2 * NUM_LINEAR},
    # A lean MLP takes the columns of its product in backward, in place of forward.
    "lean": {
        FORWARD: NUM_LINEAR - 1,
        BACKWARD: NUM_LINEAR + 1,
        ACCUMULATING: 2 * NUM_LINEAR + 1,
    },
    # FSDP2 gathers a block for each pass: one launch takes its pretrained columns and one writes;
    # two of FSDP2's own take the gradients.
    "sharded": {FORWARD: NUM_LINEAR + 2, BACKWARD: NUM_LINEAR + 4},
}
# Per optimizer step, of a model of any number of layers: one launch beyond steady passes writes the
# columns; after a look at the base, which restores the first weight alone and then the others, they
# are written once more; and the fused optimizer, in which nothing of ours hides.
PROMISED_PER_STEP = {
    "write of columns": 0,
    "look at the base": 0,
    "write of columns in all": 1,
    "look at the base in all": 3,
    "optimizer in all": 2,
}

# What comes on top of steady passes -> the passes that show it.
_PER_STEP = {"write of columns": "written", "look at the base": "look"}

Launches = dict[str, int]
"""Phase of a training run, or name of a count -> kernels."""


def make(method: str, num_layers: int, device: torch.device = CPU) -> Contender:
    """Return a model of so many layers, adapted by one of `COUNTED`."""
    values = LAYER | {"num_hidden_layers": num_layers}
    sizes = {"rank": RANK, "alpha": SCALING * RANK}
    return make_contender(method, values, torch.bfloat16, SEED, device, **sizes)


def passes(contender: Contender, batch: Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the parts of a training run in their order, to be run: kernels are told by their names.

    `forward:` and `backward:` of passes of each kind, and `optimizer` steps.
    """
    model, optimizer = contender.model, contender.optimizer
    losses: list[Tensor] = []

    def forward() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16):
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


def count_steps(contender: Contender) -> Launches:
    """Run passes of every kind; return the kernels of phases such as `forward:steady`."""
    batch = make_batch(1, NUM_TOKENS, LAYER["vocab_size"], SEED)
    counter = KernelCounter()
    with branches_of_gpu(counter), counter:
        for counter.phase, run in passes(contender, batch):
            counter.launch(0)  # a phase without kernels has a number as well
            run()
    return counter.launches


def _drop_gradients(model: nn.Module) -> None:
    """Do as `zero_grad`, without a look at the weights."""
    for module in model.modules():
        for parameter in dict.values(module._parameters):
            if parameter is not None:
                parameter.grad = None


def count_layer(
    method: str,
    setting: str = "eager",
    device: torch.device = CPU,
    count: Callable[[Contender], Launches] = count_steps,
) -> Launches:
    """Return what one decoder layer launches, and what a whole model does per optimizer step."""

    def of_model(num_layers: int) -> Launches:
        contender = make(method, num_layers, device)
        if setting == "lean":
            lean.enable(contender.model, mode="require")
        if setting == "sharded":
            contender = sharded(contender)
        return _summary(count(contender))

    with two_processes() if setting == "sharded" else nullcontext():
        fewer, more = of_model(_NUM_LAYERS - 1), of_model(_NUM_LAYERS)
    layer = {name: number - fewer[name] for name, number in more.items()}
    if setting == "sharded":
        return {name: layer[name] for name in (FORWARD, BACKWARD)}
    in_all = {f"{name} in all": more[name] for name in (*_PER_STEP, "optimizer")}
    return {name: number for name, number in layer.items() if name != "optimizer"} | in_all


def _summary(launches: Launches) -> Launches:
    def both(kind: str) -> int:
        return launches[f"forward:{kind}"] + launches[f"backward:{kind}"]

    return {
        FORWARD: launches["forward:steady"],
        BACKWARD: launches["backward:steady"],
        ACCUMULATING: launches["backward:accumulating"],
        **{name: both(kind) - both("steady") for name, kind in _PER_STEP.items()},
        "optimizer": launches["optimizer"],
    }


def sharded(contender: Contender) -> Contender:
    """Shard a contender by FSDP2, block by block, in the process group of the moment."""
    for module in reversed(list(contender.model.modules())):  # blocks before the model
        if isinstance(module, GradientCheckpointingLayer) or module is contender.model:
            fully_shard(module)
    # FSDP2 has put other parameters in the place of those that the optimizer knows.
    return replace(contender, optimizer=None)


@contextmanager
def two_processes() -> Iterator[None]:
    """Let this process be one of two, of which the other does nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


SETTINGS = {"eager": COUNTED, "lean": COUNTED, "sharded": (*HELD, "lora", "lora_bf16")}
"""Setting -> the methods that are counted in it."""


def count(*settings: str, methods: Iterable[str] = ()) -> list[Row]:
    """Return the rows of some settings, of all their methods unless given."""
    rows = []
    for setting in settings:
        for method in methods or SETTINGS[setting]:
            rows += rows_of(setting, method, count_layer(method, setting))
    return rows


def rows_of(setting: str, method: str, launches: Launches) -> list[Row]:
    """Return counts as rows."""
    return [counted(name, method, number, setting=setting) for name, number in launches.items()]


def exceeded(rows: Iterable[Row], names: Iterable[str] = ()) -> list[str]:
    """Return what PaCA launches beyond what is promised, of some names alone, a sentence each."""
    numbers = {(row.setting, row.what, row.method): int(row.value) for row in rows}
    found = []
    for (setting, what, method), number in numbers.items():
        most = PROMISED_PER_STEP.get(what) if setting in ("eager", "lean") else None
        if (beyond := PROMISED.get(setting, {}).get(what)) is not None:
            most = numbers[setting, what, "frozen"] + beyond
        if method == OURS and most is not None and number > most and what in (names or (what,)):
            found.append(f"{OURS}, {setting}: {number} kernels ({what}), at most {most} promised")
    return found


def main(options: list[str] | None = None) -> int:
    """Count, write the result, and say whether promises are kept."""
    args = new_parser(__doc__).parse_args(options)
    how = (
        f"Per Llama decoder layer (in all: of {_NUM_LAYERS} layers), weights in bfloat16, adapters "
        f"in float32, under autocast, alpha / r = {SCALING}: counted, not timed, on a CPU that "
        "takes a GPU's branches"
    )
    run = partial(count, *SETTINGS)
    problems = exceeded(record("kernels", how, run, args, options, COUNTED))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
