"""Measure what a sync of a trained model sends and how long it takes, by four methods.

    python -m benchmarks.sync                   writes benchmarks/results/sync.json

The trainer and the server are two models in one process, so that a time is what a sync costs beside
its transport: making what is sent, and writing it. The model has SmolLM2-135M's sizes and random
weights, in bfloat16; every linear layer is adapted. Changed elements are those of a step of full
training in float32.

Sizes for larger models are counted from their shapes, the changed elements with the measured share.
Then LoRA and PaCA are merged and unmerged over and over, with a small random step between, and what
became of the base is compared.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.methods import CPU
from benchmarks.results import new_parser, record
from pacatune.measure import methods
from pacatune.measure.methods import Contender
from pacatune.measure.models import llama_values, load_config, make_batch, make_model, make_skeleton
from pacatune.measure.step import Step
from pacatune.measure.timing import time_row
from pacatune.reports.rows import Origin, Row
from pacatune.sync import ColumnReceiver, ColumnSource

VALUES = llama_values(
    576, 30, num_heads=9, num_kv_heads=3, intermediate_size=1536, vocab_size=49152
) | {"tie_word_embeddings": True}
RANK = 16
LEARNING_RATE = 1e-6  # of full training
NUM_ROUNDS = 5
"""Syncs that are measured."""
NUM_CYCLES = 1000
"""Times of merging and unmerging."""
COMPUTED = ("llama3-8b", "llama3.1-70b")
SENT, TIME, SMALL = "sent per sync", "make and write", "SmolLM2-135M"
METHODS = {
    "full": "every tensor",
    "lora": "LoRA, merged, every tensor, unmerged",
    "lora-adapter": "LoRA's matrices, which the server then adds to each token",
    "elements": "changed elements with their positions, found by a snapshot",
    "paca": "PaCA's columns",
}
_ELEMENT_BYTES = 4 + 2  # a position and a value


def build(seed: int, **changes: Any) -> Any:
    """Return the model in bfloat16; the same one each time."""
    return make_model(VALUES | changes, torch.bfloat16, CPU, seed=seed)


def adapt(model: nn.Module, method: str, rank: int, seed: int) -> Contender:
    """Return the model with an adapter of random values in every linear layer."""
    contender = methods.adapt(model, method, rank=rank, seed=seed)
    with torch.no_grad():
        for name, parameter in contender.model.named_parameters():
            if "lora_B" in name or "paca_" in name:
                parameter.normal_(std=0.01)
    return contender


def train(contender: Contender, seed: int) -> None:
    """Take a step on some tokens."""
    Step(contender=contender, batch=make_batch(1, 64, VALUES["vocab_size"], seed))()


def seconds_of(function: Callable[[], object]) -> float:
    """Return the time of one run."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def copy_all(model: nn.Module, server: nn.Module, infix: str = "") -> None:
    """Copy every tensor."""
    own = dict(model.named_parameters())
    for name, tensor in server.named_parameters():
        owner, _, last = name.rpartition(".")
        source = own.get(name)
        tensor.copy_(own[f"{owner}{infix}.{last}"] if source is None else source)


def _bytes(method: str, value: float, origin: Origin = "counted", model: str = SMALL) -> Row:
    return Row(what=SENT, method=method, value=value, unit="bytes", model=model, origin=origin)


def _times(method: str, times: list[float]) -> Row:
    """Return the median of all rounds but the first."""
    return time_row(times[1:], what=TIME, method=method, model=SMALL)


def measure_full(seed: int) -> list[Row]:
    model, server = build(seed), build(seed)
    times = [seconds_of(lambda: copy_all(model, server)) for _ in range(NUM_ROUNDS + 1)]
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return [_bytes("full", num_bytes), _times("full", times)]


def measure_lora(seed: int) -> list[Row]:
    server = build(seed)
    adapted: Any = adapt(build(seed), "lora", RANK, seed).model

    def sync() -> None:
        adapted.merge_adapter()
        copy_all(adapted.get_base_model(), server, ".base_layer")
        adapted.unmerge_adapter()

    times = [seconds_of(sync) for _ in range(NUM_ROUNDS + 1)]
    num_bytes = sum(parameter.nbytes for parameter in server.parameters())
    of_matrices = 2 * sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    adapter = _bytes("lora-adapter", of_matrices)
    return [_bytes("lora", num_bytes), _times("lora", times), adapter]


def measure_elements(seed: int) -> tuple[list[Row], float]:
    """Return rows, and the share of the elements that a step changes."""
    model, server = build(seed).float(), build(seed)
    snapshot = [parameter.detach().bfloat16() for parameter in model.parameters()]
    targets = [parameter.detach().view(-1) for parameter in server.parameters()]
    contender = Contender("full", model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    counts: list[int] = []

    @torch.no_grad()
    def sync() -> None:
        count = 0
        for number, parameter in enumerate(model.parameters()):
            new = parameter.bfloat16()
            places = (new != snapshot[number]).view(-1).nonzero()[:, 0]
            targets[number].index_copy_(0, places, new.view(-1)[places])
            snapshot[number] = new
            count += len(places)
        counts.append(count)

    times = []
    for number in range(NUM_ROUNDS + 1):
        train(contender, seed + number)
        times.append(seconds_of(sync))
    # The first step of Adam moves all elements by as much; later ones are the usual case.
    num_elements = statistics.median(counts[1:])
    share = num_elements / sum(target.numel() for target in targets)
    return [
        _bytes("elements", int(_ELEMENT_BYTES * num_elements), "measured"),
        _times("elements", times),
        Row(what="changed by a step", method="elements", value=100 * share, unit="%"),
    ], share


def measure_paca(seed: int) -> list[Row]:
    server, contender = build(seed), adapt(build(seed), "paca", RANK, seed)
    adapted: Any = contender.model
    source, receiver = ColumnSource(adapted), ColumnReceiver(server)
    receiver.expect(source.positions())
    receiver.apply(source.columns())  # from now on the base's columns are kept
    sent: list[int] = []

    def sync() -> None:
        columns = source.columns()
        receiver.apply(columns)
        sent.append(columns.num_bytes)

    times = []
    for number in range(NUM_ROUNDS + 1):
        train(contender, seed + number)
        times.append(seconds_of(sync))
    merged = adapted.merge_and_unload().state_dict()
    if not all(torch.equal(tensor, merged[name]) for name, tensor in server.state_dict().items()):
        raise RuntimeError("the served model is not the merged one.")
    return [_bytes("paca", sent[-1]), _times("paca", times)]


def count(name: str, rank: int, share: float) -> list[Row]:
    """Return the bytes of a large model's syncs."""
    model = make_skeleton(load_config(name), name, torch.bfloat16)
    num_elements = model.num_parameters()
    layers = [one for one in model.base_model.modules() if isinstance(one, nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    found: dict[str, tuple[int, Origin]] = {
        "full": (2 * num_elements, "counted"),
        "lora": (2 * num_elements, "counted"),
        "lora-adapter": (2 * rank * (inputs + outputs), "counted"),
        "elements": (int(_ELEMENT_BYTES * share * num_elements), "simulated"),
        "paca": (2 * rank * outputs, "counted"),
    }
    return [_bytes(method, size, origin, name) for method, (size, origin) in found.items()]


@torch.no_grad()
def measure_drift(seed: int) -> list[Row]:
    """Return how far the base of one layer is from what it was after many merges and unmerges."""
    rows = []
    for method in ("lora", "paca"):
        adapted = adapt(build(seed, num_hidden_layers=1, vocab_size=64), method, RANK, seed).model
        layers: list[Any] = [one for one in adapted.modules() if hasattr(one, "merged_adapters")]
        before = torch.cat([layer.get_base_layer().weight.flatten() for layer in layers]).double()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        for _ in range(NUM_CYCLES):
            for parameter in trained:  # a step of training between two syncs
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
            for layer in layers:
                layer.merge()
                layer.unmerge()
        after = torch.cat([layer.get_base_layer().weight.flatten() for layer in layers]).double()
        changed = 100 * float((before != after).double().mean())
        mean = 100 * float((after - before).abs().sum() / before.abs().sum())
        for what, value in (("changed elements of the base", changed), ("mean change", mean)):
            rows.append(Row(what=what, method=method, value=value, unit="%", n=NUM_CYCLES))
    return rows


def measure(seed: int) -> list[Row]:
    """Return every row."""
    elements, share = measure_elements(seed)
    rows = [*measure_full(seed), *measure_lora(seed), *elements, *measure_paca(seed)]
    rows += [row for name in COMPUTED for row in count(name, RANK, share)]
    return rows + measure_drift(seed)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    args = new_parser(__doc__, is_timed=True).parse_args(options)
    how = (
        f"Llama of SmolLM2-135M's sizes, bfloat16, r = {RANK}; medians beside any transport; sizes "
        "of larger models from their shapes"
    )
    record("sync", how, lambda: measure(args.seed), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
