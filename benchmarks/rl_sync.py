"""Measure what keeps a sampler in step with its trainer: bytes, time, and whose bits it has then.

    python -m benchmarks.rl_sync                   writes benchmarks/results/rl_sync.json
    python -m benchmarks.rl_sync --quick           the same in minutes, less often

With a Python that has vLLM (`sh tools/test_vllm.sh -m benchmarks.rl_sync`) a real vLLM is measured,
too. What is measured without one, or quickly, goes to rl_sync-part.json and leaves the other. Each
method trains a copy of SmolLM2-135M-Instruct in bfloat16 and brings it to a sampler.

    sent, sync          bytes; making and writing them, beside any transport
    token               time per token of answers, against those of the plain base
    gap, same tokens    |log p_train - log p_sample| of one pass over the same tokens
    gap, drawn tokens   the same with what the sampler had when it drew them, by other kernels
    base                what many syncs, with a step between them, leave of the trainer's base
"""

import functools
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods import CPU
from benchmarks.results import counted, new_parser, record
from benchmarks.swap import merge_swapped, swap_layers
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import llama_values, load_config, make_model, make_skeleton
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.reports.rows import Row
from pacatune.sync import ColumnReceiver, ColumnSource, InProcess

RANK = 16
RATES = {"paca": 2e-3, "swap": 2e-3, "full": 1e-6, "elements": 1e-6}
"""Learning rates; 1e-3 for the others."""
METHODS = {
    "base": "the plain base, not trained",
    "paca": "PaCA's columns",
    "swap": "PEFT 0.22's PaCA (emulated), merged, every tensor, unmerged",
    "lora": "LoRA, merged, every tensor, unmerged",
    "lora-adapter": "LoRA's matrices, which the sampler adds to each token",
    "full": "full fine-tuning in float32 under autocast, every tensor",
    "elements": "the same, changed elements with their positions, found by a snapshot",
}
SENT, MODEL = "sent per sync", "SmolLM2-135M"
COMPUTED = ("llama3-8b", "llama3.1-70b")
_ELEMENT_BYTES = 4 + 2  # a position and a value
_WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "paper", "light", "music", "bread")


def load() -> Any:
    """Return the base, the same one each time."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.bfloat16)


@functools.cache
def base_path() -> str:
    """Return the folder of a real model, made from a package."""
    from examples.packaged import prepare

    return str(prepare("smollm2"))


def text_ids(seed: int, *shape: int) -> Tensor:
    """Return (B, T) tokens of lists of words and the same lists reversed, one after the other."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(math.prod(shape) // 6):
        words = [_WORDS[i] for i in torch.randperm(len(_WORDS), generator=generator)[:3]]
        lines.append(f"{', '.join(words)} -> {', '.join(reversed(words))}\n")
    ids = AutoTokenizer.from_pretrained(base_path())("".join(lines))["input_ids"]
    return torch.tensor(ids[: math.prod(shape)]).view(shape)


def logps_of(model: Any, ids: Tensor) -> Tensor:
    """Return (B, T - 1) log-probabilities of tokens, in one pass."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


class Trainer:
    """A model that one method trains."""

    def __init__(self, method: str, model: nn.Module, seed: int) -> None:
        self.is_full = method in ("full", "elements")
        contender = adapt_by(method, model.float() if self.is_full else model, seed)
        self.method, self.model, self.num_steps = method, cast(Any, contender.model), 0
        self.optimizer = cast(torch.optim.Optimizer, contender.optimizer)
        if method != "base":
            self.optimizer.param_groups[0]["lr"] = RATES.get(method, 1e-3)

    def autocast(self) -> torch.autocast:
        """Return what full training in float32 computes in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_full)

    def logps(self, ids: Tensor) -> Tensor:
        """Return what the loss is made of, as the training pass computes it."""
        with self.autocast():
            return logps_of(self.model.train(), ids).detach()

    def step(self) -> None:
        """Take one on new text."""
        self.num_steps += 1
        ids = text_ids(self.num_steps, 8, 64)
        with self.autocast():
            (-logps_of(self.model.train(), ids).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole model in the sampler's dtype, by the checkpoint's names, merged."""
        merge, unmerge = merging(self.method, self.model)
        merge()
        for name, tensor in self.model.named_parameters():
            if not any(part in name for part in ("lora_", "paca_")):
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield plain, tensor.detach().bfloat16()
        unmerge()


def adapt_by(method: str, model: nn.Module, seed: int, rank: int = RANK) -> Contender:
    """Return the model with the adapter of a method in every linear layer."""
    plain = {"base": "frozen", "elements": "full"}.get(method, method.partition("-")[0])
    if method == "swap":
        plain = "paca"
    contender = adapt(model, plain, rank=rank, seed=seed)
    if method == "swap":
        swap_layers(contender.model)
    return contender


def merging(method: str, model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what merges a method's adapter and what takes it out again."""
    if method == "lora":
        return model.merge_adapter, model.unmerge_adapter
    if method == "swap":
        return partial(merge_swapped, model, 1), partial(merge_swapped, model, -1)
    return (lambda: None), (lambda: None)


class Transformers:
    """A sampler that is a model of transformers, with an adapter's matrices or without."""

    name = "transformers"

    def __init__(self, method: str, model: Any, seed: int) -> None:
        self.receiver, self.transport = ColumnReceiver(model), InProcess()
        is_plain = method != "lora-adapter"
        self.model: Any = (model if is_plain else adapt_by(method, model, seed).model).eval()
        self.own = dict(self.model.named_parameters())

    @torch.no_grad()
    def write(self, tensors: Iterator[tuple[str, Tensor]]) -> int:
        """Copy whole tensors; return how many bytes they have."""
        return sum(self.own[name].copy_(tensor).nbytes for name, tensor in tensors)

    def send(self, source: ColumnSource) -> int:
        """Send columns; return how many bytes they have."""
        columns = source.send(self.transport)
        self.receiver.receive(self.transport)
        return columns.num_bytes

    @torch.no_grad()
    def write_elements(self, name: str, places: Tensor, values: Tensor) -> None:
        """Write some elements of a tensor."""
        self.own[name].view(-1).index_copy_(0, places, values)

    def write_adapter(self, model: Any) -> int:
        """Copy LoRA's matrices, which vLLM and PEFT hold in the model's dtype."""
        matrices = [(n, p.detach()) for n, p in model.named_parameters() if "lora_" in n]
        return self.write((name, tensor.bfloat16()) for name, tensor in matrices) // 2

    @torch.no_grad()
    def draw(self, prompts: Tensor, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return (B, T) prompts with answers, and (B, N) log-probabilities at their drawing."""
        torch.manual_seed(seed)
        self.model.generation_config.eos_token_id = None
        found = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logps = torch.stack(found.logits, 1).log_softmax(-1)
        ids = found.sequences
        return ids, logps.gather(-1, ids[:, -num_tokens:, None])[..., 0]


class Sync:
    """Brings what a trainer holds to its sampler, and counts it."""

    def __init__(self, trainer: Trainer, sampler: Any) -> None:
        self.trainer, self.sampler = trainer, sampler
        self.num_bytes: list[int] = []
        self.source: ColumnSource | None = None
        self.snapshot: dict[str, Tensor] = {}
        method = trainer.method
        if method.startswith("paca"):
            self.source = ColumnSource(trainer.model, torch.bfloat16)
        elif method == "elements":
            self.snapshot = {name: tensor.clone() for name, tensor in trainer.tensors()}

    def __call__(self) -> float:
        """Sync; return how long it took."""
        start = time.perf_counter()
        if self.source is not None:
            num_bytes = self.sampler.send(self.source)
        elif self.snapshot:
            num_bytes = self._send_elements()
        elif self.trainer.method == "lora-adapter":
            num_bytes = self.sampler.write_adapter(self.trainer.model)
        else:
            num_bytes = self.sampler.write(self.trainer.tensors())
        end = time.perf_counter()
        self.num_bytes.append(num_bytes)
        return end - start

    def _send_elements(self) -> int:
        count = 0
        for name, new in self.trainer.tensors():
            places = (new != self.snapshot[name]).view(-1).nonzero()[:, 0]
            self.sampler.write_elements(name, places, new.view(-1)[places])
            self.snapshot[name] = new
            count += len(places)
        return _ELEMENT_BYTES * count

    def step_and_sync(self) -> float:
        """Train between two syncs."""
        self.trainer.step()
        return self()


def gaps(trainer: Trainer, sampler: Any, prompts: Tensor, args: Any) -> list[Row]:
    """Return how far the sampler's log-probabilities are from the trainer's."""
    ids, drawn = sampler.draw(prompts, args.drawn, args.seed)
    trained = trainer.logps(ids)
    found = {"drawn": drawn - trained[:, -args.drawn :]}
    if sampler.name == "transformers":  # by the kernels of training
        found["same"] = logps_of(sampler.model, ids).detach() - trained
    rows = []
    for kind, difference in found.items():
        names: dict[str, Any] = {"method": trainer.method, "setting": sampler.name}
        names["n"] = difference.numel()
        distance = difference.abs().double()
        rows.append(Row(what=f"gap, {kind} tokens", value=float(distance.mean()), **names))
        rows.append(Row(what=f"largest gap, {kind} tokens", value=float(distance.max()), **names))
    return rows


def measure_syncs(args: Any) -> list[Row]:
    """Return bytes, times and gaps of every method with transformers' generation."""
    prompts, seed = text_ids(0, 16, 8), args.seed
    syncs = {m: Sync(Trainer(m, load(), seed), Transformers(m, load(), seed)) for m in METHODS}
    rows = gaps(syncs["base"].trainer, syncs["base"].sampler, prompts, args)
    trained = {method: one for method, one in syncs.items() if method != "base"}
    runs = {method: one.step_and_sync for method, one in trained.items()}
    times = alternate(runs, seconds=0, min_rounds=args.rounds, num_warmup=1)
    for method, one in trained.items():
        origin: Any = "measured" if method == "elements" else "counted"
        sent = statistics.median(one.num_bytes[1:])  # Adam's first step moves all elements
        rows.append(
            Row(what=SENT, method=method, value=sent, unit="bytes", model=MODEL, origin=origin)
        )
        rows.append(time_row(times[method], what="sync", method=method, setting="transformers"))
        rows += gaps(one.trainer, one.sampler, prompts, args)
    samplers = {m: syncs[m].sampler for m in ("base", "paca", "lora-adapter")}
    elements = next(row.value for row in rows if (row.what, row.method) == (SENT, "elements"))
    share = (
        elements / _ELEMENT_BYTES / sum(p.numel() for p in syncs["base"].trainer.model.parameters())
    )
    rows.append(Row(what="changed by a step", method="elements", value=100 * share, unit="%"))
    rows += [row for name in COMPUTED for row in count(name, RANK, share)]
    return rows + token_rows(samplers, prompts, args)


def token_rows(samplers: Mapping[str, Any], prompts: Tensor, args: Any) -> list[Row]:
    """Return the time of a token of an answer, the samplers taking turns."""

    def seconds(sampler: Any) -> float:
        start = time.perf_counter()
        sampler.draw(prompts, args.drawn, args.seed)
        return (time.perf_counter() - start) / args.drawn

    runs = {method: partial(seconds, sampler) for method, sampler in samplers.items()}
    times = alternate(runs, seconds=0, min_rounds=args.rounds, num_warmup=1)
    setting = samplers["base"].name
    rows = [time_row(t, what="token", method=m, setting=setting) for m, t in times.items()]
    for method in [name for name in times if name != "base"]:
        names = {"what": "token / base", "method": method, "setting": setting}
        rows.append(ratio_row(times[method], times["base"], seed=args.seed, **names))
    return rows


def measure_vllm(args: Any) -> list[Row]:
    """Return times and gaps of what can be brought to a vLLM."""
    from benchmarks.rl_vllm import Vllm

    prompts, rows = text_ids(0, 16, 8), []
    kinds = ("base", "paca", "lora-adapter", "merged")
    samplers = {kind: Vllm(base_path(), kind, RANK) for kind in kinds}
    try:
        rows += gaps(Trainer("base", load(), args.seed), samplers["base"], prompts, args)
        for method in [name for name in METHODS if name not in ("base", "elements")]:
            sampler = samplers.get(method, samplers["merged"])
            sync = Sync(Trainer(method, load(), args.seed), sampler)
            times = [sync.step_and_sync() for _ in range(1 + args.rounds)][1:]
            rows.append(time_row(times, what="sync", method=method, setting=sampler.name))
            rows += gaps(sync.trainer, sampler, prompts, args)
            if method == "paca":
                sampler.transport.revert()
            elif sampler is samplers["merged"]:
                sampler.write(load().named_parameters())
            gc.collect()
        rows += token_rows({kind: samplers[kind] for kind in kinds[:-1]}, prompts, args)
    finally:
        for sampler in samplers.values():
            sampler.close()
    return rows


def count(name: str, rank: int, share: float) -> list[Row]:
    """Return the bytes of a large model's syncs, from its shapes."""
    model = make_skeleton(load_config(name), name, torch.bfloat16)
    num_elements = model.num_parameters()
    layers = [one for one in model.base_model.modules() if isinstance(one, nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    found = dict.fromkeys(("swap", "lora", "full"), 2 * num_elements)
    found["paca"] = 2 * rank * outputs
    found["lora-adapter"] = 2 * rank * (inputs + outputs)
    rows = [counted(SENT, method, size, "bytes", model=name) for method, size in found.items()]
    elements = _ELEMENT_BYTES * share * num_elements
    names: dict[str, Any] = {"method": "elements", "model": name, "origin": "simulated"}
    return [*rows, Row(what=SENT, value=int(elements), unit="bytes", **names)]


@torch.no_grad()
def measure_base(args: Any) -> list[Row]:
    """Return how far the trainer's base is from what it was, after many syncs of one block."""
    values = llama_values(
        576, 1, num_heads=9, num_kv_heads=3, intermediate_size=1536, vocab_size=64
    )
    rows = []
    for method in ("paca", "swap", "lora"):
        server, own = (make_model(values, torch.bfloat16, CPU, seed=args.seed) for _ in range(2))
        before = {name: tensor.clone() for name, tensor in server.named_parameters()}
        trainer = Trainer(method, own, args.seed)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        for one in trained:
            one.normal_(std=0.01)
        sync = Sync(trainer, Transformers(method, server, args.seed))
        for _ in range(args.cycles):
            for one in trained:  # a step of training between two syncs
                one.add_(torch.randn_like(one), alpha=1e-4)
            sync()
        with trainer.model.disable_adapter() if method != "swap" else nullcontext():
            trainer.method = "base"  # nothing is merged
            after = dict(trainer.tensors())
        old, new = (torch.cat([m[n].flatten() for n in before]).double() for m in (before, after))
        changed = 100 * float((new != old).double().mean())
        mean = 100 * float((new - old).abs().sum() / old.abs().sum())
        for what, value in (("changed elements of the base", changed), ("mean change", mean)):
            rows.append(Row(what=what, method=method, value=value, unit="%", n=args.cycles))
    return rows


def measure(args: Any) -> list[Row]:
    """Return every row."""
    rows = [*measure_syncs(args), *measure_base(args)]
    return rows + (measure_vllm(args) if args.has_vllm else [])


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, tokens and cycles")
    args = parser.parse_args(options)
    args.rounds, args.drawn, args.cycles = (3, 16, 100) if args.quick else (10, 32, 1000)
    how = (
        f"SmolLM2-135M-Instruct, bfloat16, all linear layers, r = {RANK}; medians of {args.rounds} "
        f"syncs, a training step before each; gaps of {16 * args.drawn} drawn tokens or more; what "
        f"{args.cycles} syncs leave of one block; sizes of larger models from their shapes"
    )
    args.has_vllm = importlib.util.find_spec("vllm") is not None
    name = "rl_sync" if args.has_vllm and not args.quick else "rl_sync-part"
    record(name, how, lambda: measure(args), args, options, METHODS)
    if not args.has_vllm:
        print("vLLM is not installed here: transformers' generation alone was measured.")


if __name__ == "__main__":
    sys.exit(main())
