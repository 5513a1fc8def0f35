"""Measure what a sync of a trained model sends and how long it takes, by four methods.

    python -m benchmarks.sync                   writes benchmarks/results/sync.json

The trainer and the server are two models in one process, so that a time is what a sync costs beside
its transport: making what is sent, and writing it. The model has SmolLM2-135M's sizes and random
weights, in bfloat16; every linear layer is adapted.

    full       every tensor
    lora       PEFT's LoRA, merged, every tensor sent, unmerged
    elements   elements that differ from a snapshot after a step of full training in float32, with
               their positions
    paca       the changed columns

Sizes for larger models are counted from their shapes, the changed elements with the measured share.
Then LoRA and PaCA are merged and unmerged over and over, with a small random step between, and what
became of the base is compared.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import (
    Result,
    add_run,
    at_least_1,
    counted,
    new_parser,
    prepare,
    provenance,
    show,
)
from pacatune import PacaConfig
from pacatune.measure.presets import PRESETS
from pacatune.reports.rows import Row
from pacatune.sync import ColumnReceiver, ColumnSource

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


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--learning-rate", type=float, default=1e-6, help="of full training")
    add("--rounds", type=at_least_1, default=5, help="syncs that are measured")
    add("--cycles", type=at_least_1, default=1000, help="of merging and unmerging")
    add_run(
        parser,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_groups=3,
        vocab_size=49152,
        rank=16,
    )
    return parser.parse_args(options)


def build(args: argparse.Namespace, num_layers: int | None = None) -> LlamaForCausalLM:
    """Return the model in bfloat16; the same one each time."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=num_layers or args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_groups,
        vocab_size=args.vocab_size if num_layers is None else 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16()


def adapt(model: nn.Module, args: argparse.Namespace, *, lora: bool) -> Any:
    """Return the model with an adapter of random values in every linear layer."""
    rank = args.rank
    config: Any = (
        LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        if lora
        else PacaConfig(r=rank, paca_alpha=rank, target_modules="all-linear")
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "paca_" in name:
                parameter.normal_(std=0.01)
    return adapted


def train(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
    """Take a step on some tokens."""
    ids = torch.randint(args.vocab_size, (1, 64))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds_of(function: Callable[[], object]) -> float:
    """Return the time of one run."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def copy_all(model: nn.Module, server: nn.Module, infix: str = "") -> int:
    """Copy every tensor; return their bytes."""
    own, num_bytes = dict(model.named_parameters()), 0
    for name, tensor in server.named_parameters():
        owner, _, last = name.rpartition(".")
        source = own.get(name)
        source = own[f"{owner}{infix}.{last}"] if source is None else source
        tensor.copy_(source)
        num_bytes += tensor.nbytes
    return num_bytes


def _sent(method: str, num_bytes: int, times: list[float] | None = None) -> list[Row]:
    """Return rows of a sync: its bytes, and the median time of all rounds but the first."""
    rows = [counted(SENT, method, num_bytes, "bytes", model=SMALL)]
    return rows if times is None else [*rows, _median(TIME, method, times[1:])]


def _median(what: str, method: str, times: list[float]) -> Row:
    value = 1e3 * statistics.median(times)
    return Row(what=what, method=method, value=value, unit="ms", n=len(times), model=SMALL)


def measure_full(args: argparse.Namespace) -> list[Row]:
    model, server = build(args), build(args)
    times = [seconds_of(lambda: copy_all(model, server)) for _ in range(args.rounds + 1)]
    return _sent("full", sum(parameter.nbytes for parameter in model.parameters()), times)


def measure_lora(args: argparse.Namespace) -> list[Row]:
    server, adapted = build(args), adapt(build(args), args, lora=True)

    def sync() -> None:
        adapted.merge_adapter()
        copy_all(adapted.get_base_model(), server, ".base_layer")
        adapted.unmerge_adapter()

    times = [seconds_of(sync) for _ in range(args.rounds + 1)]
    num_bytes = sum(parameter.nbytes for parameter in server.parameters())
    matrices = [p for name, p in adapted.named_parameters() if "lora_" in name]
    of_matrices = 2 * sum(matrix.numel() for matrix in matrices)
    return [*_sent("lora", num_bytes, times), *_sent("lora-adapter", of_matrices)]


def measure_elements(args: argparse.Namespace) -> tuple[list[Row], float]:
    """Return rows, and the share of the elements that a step changes."""
    model, server = build(args).float(), build(args)
    snapshot = [parameter.detach().bfloat16() for parameter in model.parameters()]
    targets = [parameter.detach().view(-1) for parameter in server.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
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
    for _ in range(args.rounds + 1):
        train(model, optimizer, args)
        times.append(seconds_of(sync))
    # The first step of Adam moves all elements by as much; later ones are the usual case.
    num_elements = statistics.median(counts[1:])
    total = sum(target.numel() for target in targets)
    share = num_elements / total
    changed = Row(what="changed by a step", method="elements", value=100 * share, unit="%")
    return [*_sent("elements", int(_ELEMENT_BYTES * num_elements), times), changed], share


def measure_paca(args: argparse.Namespace) -> list[Row]:
    server, adapted = build(args), adapt(build(args), args, lora=False)
    source, receiver = ColumnSource(adapted), ColumnReceiver(server)
    receiver.expect(source.positions())
    receiver.apply(source.columns())  # from now on the base's columns are kept
    deltas = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(deltas, lr=1e-4)
    source_times, times = [], []
    for _ in range(args.rounds + 1):
        train(adapted, optimizer, args)
        start = time.perf_counter()
        columns = source.columns()
        source_times.append(time.perf_counter() - start)
        receiver.apply(columns)
        times.append(time.perf_counter() - start)
    positions = source.positions()
    merged = adapted.merge_and_unload().state_dict()
    if not all(torch.equal(tensor, merged[name]) for name, tensor in server.state_dict().items()):
        raise RuntimeError("the served model is not the merged one.")
    of_positions = sum(one.indices.nbytes for one in positions.sets)
    return [
        *_sent("paca", columns.num_bytes, times),
        _median("make", "paca", source_times[1:]),
        counted("positions, once", "paca", of_positions, "bytes", model=SMALL),
        counted("kept by the receiver", "paca", receiver.num_bytes, "bytes", model=SMALL),
    ]


def count(name: str, rank: int, share: float) -> list[Row]:
    """Return the bytes of a large model's syncs."""
    values = {key: value for key, value in PRESETS[name].values.items() if key != "model_type"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values))
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    layers = [one for one in model.model.modules() if isinstance(one, nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    found = {
        "full": 2 * num_elements,
        "lora": 2 * num_elements,
        "lora-adapter": 2 * rank * (inputs + outputs),
        "elements": int(_ELEMENT_BYTES * share * num_elements),
        "paca": 2 * rank * outputs,
    }
    return [counted(SENT, method, size, "bytes", model=name) for method, size in found.items()]


def measure_drift(args: argparse.Namespace) -> list[Row]:
    """Return how far the base of one layer is from what it was after many merges and unmerges."""
    rows = []
    for method in ("lora", "paca"):
        adapted = adapt(build(args, 1), args, lora=method == "lora")
        layers = [one for one in adapted.modules() if hasattr(one, "merged_adapters")]
        before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        for _ in range(args.cycles):
            with torch.no_grad():
                for parameter in trained:  # a step of training between two syncs
                    parameter.add_(torch.randn_like(parameter), alpha=1e-4)
            for layer in layers:
                layer.merge()
                layer.unmerge()
        after = [layer.get_base_layer().weight.detach() for layer in layers]
        pairs = list(zip(before, after, strict=True))
        num_elements = sum(weight.numel() for weight in before)
        drift = sum(float((a.double() - b.double()).abs().sum()) for a, b in pairs)
        changed = 100 * sum(int((a != b).sum()) for a, b in pairs) / num_elements
        mean = 100 * drift / sum(float(a.double().abs().sum()) for a in before)
        for what, value in (("changed elements of the base", changed), ("mean change", mean)):
            rows.append(Row(what=what, method=method, value=value, unit="%", n=args.cycles))
    return rows


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    args = parse(options)
    prepare(args)
    model = f"Llama of SmolLM2-135M's sizes, bfloat16, r = {args.rank}"
    if args.num_layers != 30:
        model = f"Llama, hidden {args.hidden_size}, {args.num_layers} layers, r = {args.rank}"
    how = f"{model}; medians beside any transport; sizes of larger models from their shapes"
    made = provenance("sync", how, options, args)
    elements, share = measure_elements(args)
    rows = [*measure_full(args), *measure_lora(args), *elements, *measure_paca(args)]
    rows += [row for name in COMPUTED for row in count(name, args.rank, share)]
    rows += measure_drift(args)
    show(Result(name="sync", rows=rows, methods=METHODS, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
