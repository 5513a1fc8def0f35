"""Measure what keeps a sampler in step with its trainer: bytes, time, and whose bits it has then.

    python -m benchmarks.rl_sync                   writes benchmarks/results/rl_sync.json
    python -m benchmarks.rl_sync --quick           the same in minutes, less often

With a Python that has vLLM (`sh tools/test_vllm.sh -m benchmarks.rl_sync`) the sampler is a vLLM.
Without one it is a model of transformers; that, and what is measured quickly, goes to
rl_sync-part.json and leaves the other. Each method trains a copy of SmolLM2-135M-Instruct in
bfloat16 and brings it to a sampler.

    served      fixed tokens, scored by the sampler after 1 and 100 syncs, and by one that was
                started from the folder of the merged model
    drawn       what the sampler draws, and what the trainer says of it, by the names of verl and
                TRL: `rollout_probs_diff`, `sampling_logp_difference`, `k3_kl`
    sent, sync  bytes; making and writing them, beside any transport
    token       time per token of answers, against those of the plain base
"""

import copy
import functools
import gc
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import counted, mean_row, new_parser, record
from benchmarks.swap import merge_swapped, swap_layers
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import load_config, make_skeleton
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.reports.rows import Row
from pacatune.sync import ColumnReceiver, ColumnSource, InProcess
from pacatune.sync.message import Columns, to_wire

RANK, RANKS = 16, (8, 64)
RATES = {"paca": 2e-3, "swap": 2e-3, "full": 1e-6, "elements": 1e-6}
"""Learning rates; 1e-3 for the others."""
METHODS = {
    "base": "the plain base, not trained",
    "paca": "PaCA's columns",
    "swap": "PEFT 0.22's PaCA (emulated), merged, every tensor, unmerged",
    "lora": "LoRA, merged, every tensor, unmerged",
    "lora-adapter": "LoRA's matrices, which the sampler adds to each token",
    "lora-bf16": "the same, its matrices in bfloat16 in the trainer, too",
    "full": "full fine-tuning in float32 under autocast, every tensor",
    "elements": "the same, changed elements with their positions, found by a snapshot",
}
DRAWN = [name for name in METHODS if name not in ("swap", "elements")]
BESIDE = ("lora-adapter", "lora-bf16")
SENT, COMPLETE, MODEL = "sent per sync", "complete sync", "SmolLM2-135M"
COMPUTED = ("llama3-8b", "llama3.1-70b")
_ELEMENT_BYTES = 4 + 2  # a position and a value
_WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "paper", "light", "music", "bread")


def load(path: str | None = None) -> Any:
    """Return a model in bfloat16: the base, the same one each time."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path or base_path(), dtype=torch.bfloat16)


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

    def __init__(
        self, method: str, model: nn.Module, seed: int, rank: int = 0, rate: float | None = None
    ) -> None:
        self.is_full = method in ("full", "elements")
        contender = adapt_by(method, model.float() if self.is_full else model, seed, rank or RANK)
        self.method, self.model, self.num_steps = method, cast(Any, contender.model), 0
        self.optimizer = cast(torch.optim.Optimizer, contender.optimizer)
        self.rate = rate or RATES.get(method, 1e-3)
        if method != "base":
            self.optimizer.param_groups[0]["lr"] = self.rate

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
    def walk(self, seed: int) -> None:
        """Move each trained value by a step of its rate, up or down, as Adam's first step does."""
        generator = torch.Generator().manual_seed(seed)
        for one in self.model.parameters():
            if one.requires_grad:
                ups = torch.randint(2, one.shape, generator=generator)
                one.add_((2 * ups - 1).to(one.dtype), alpha=self.rate)

    @torch.no_grad()
    def tensors(self, *, is_merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole model in the sampler's dtype, by the checkpoint's names."""
        nothing = (lambda: None), (lambda: None)
        merge, unmerge = merging(self.method, self.model) if is_merged else nothing
        merge()
        for name, tensor in self.model.named_parameters():
            if not any(part in name for part in ("lora_", "paca_")):
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield plain, tensor.detach().bfloat16()
        unmerge()


def adapt_by(method: str, model: nn.Module, seed: int, rank: int) -> Contender:
    """Return the model with the adapter of a method in every linear layer."""
    plain = {"base": "frozen", "elements": "full", "swap": "paca"}.get(method)
    dtype = torch.bfloat16 if method == "lora-bf16" else None
    plain = plain or method.partition("-")[0]
    contender = adapt(model, plain, rank=rank, seed=seed, adapter_dtype=dtype)
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

    def __init__(self, path: str, method: str, rank: int) -> None:
        self.path, self.model = path, load(path)
        self.receiver, self.transport = ColumnReceiver(self.model), InProcess()
        if method in BESIDE:
            self.model = adapt_by(method, self.model, 0, rank).model
        self.own = dict(self.model.eval().named_parameters())

    @torch.no_grad()
    def write(self, tensors: Iterator[tuple[str, Tensor]]) -> int:
        """Copy whole tensors; return how many bytes they have."""
        return sum(self.own[name].copy_(tensor).nbytes for name, tensor in tensors)

    def send(self, source: ColumnSource) -> Columns:
        """Send columns; return them."""
        columns = source.send(self.transport)
        self.receiver.receive(self.transport)
        return columns

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        """Return (B, T - 1) log-probabilities of tokens that are given."""
        return logps_of(self.model, ids)

    def score_anew(self, path: str, ids: Tensor) -> Tensor:
        """Return the same of a model in a folder."""
        return Transformers(path, "base", RANK).score(ids)

    def close(self) -> None:
        """Leave it to Python."""

    @torch.no_grad()
    def write_elements(self, name: str, places: Tensor, values: Tensor) -> None:
        """Write some elements of a tensor."""
        self.own[name].view(-1).index_copy_(0, places, values)

    def write_adapter(self, model: Any) -> int:
        """Copy LoRA's matrices, which vLLM and PEFT hold in the model's dtype."""
        matrices = [(n, p.detach()) for n, p in model.named_parameters() if "lora_" in n]
        name, first = matrices[0]  # A, (r, I)
        if self.own[name].shape != first.shape:
            self.__init__(self.path, "lora-adapter", len(first))
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
        self.packing: list[float] = []
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
        num_bytes = 0
        if self.source is not None:
            columns = self.sampler.send(self.source)
        elif self.snapshot:
            num_bytes = self._send_elements()
        elif self.trainer.method in BESIDE:
            num_bytes = self.sampler.write_adapter(self.trainer.model)
        else:
            num_bytes = self.sampler.write(self.trainer.tensors())
        end = time.perf_counter()
        if self.source is not None:  # as HTTP and files carry it
            num_bytes = to_wire(columns)[1].nbytes
            self.packing.append(time.perf_counter() - end)
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


def agreement(trained: Tensor, drawn: Tensor) -> dict[str, float]:
    """Return how far a sampler's log-probabilities of what it drew are from the trainer's.

    By the names of verl and TRL; the last one, in per cent, is what a clip to these bounds cuts.
    """
    trained, drawn = trained.double(), drawn.double()
    probs, logps, ratio = trained.exp() - drawn.exp(), trained - drawn, (trained - drawn).exp()
    return {
        "rollout_probs_diff, mean": float(probs.abs().mean()),
        "rollout_probs_diff, max": float(probs.abs().max()),
        "sampling_logp_difference, mean": float(logps.abs().mean()),
        "sampling_logp_difference, max": float(logps.abs().max()),
        "k3_kl": float((ratio - 1 - logps).mean()),
        "ratios beyond 0.8 to 1.25": 100 * float(((ratio < 0.8) | (ratio > 1.25)).double().mean()),
    }


def measure_drawn(samplers: Mapping[str, Any], args: Any) -> Iterator[Row]:
    """Measure what each method's sampler draws, for several seeds of training and drawing."""
    for method in DRAWN:
        sampler, found = sampler_of(method, samplers), defaultdict[str, dict[str, float]](dict)
        for seed in range(args.seeds):
            trainer = Trainer(method, load(), seed)
            sync = Sync(trainer, sampler)
            for _ in range(args.rounds if method != "base" else 0):
                sync.step_and_sync()
            ids, drawn = sampler.draw(text_ids(seed, 16, 8), args.drawn, seed)
            values = agreement(trainer.logps(ids)[:, -args.drawn :], drawn)
            for what, value in values.items():
                found[what][f"seed {seed}"] = value
            reset(sampler, method)
        for what, each in found.items():
            names = {
                "method": method,
                "setting": sampler.name,
                "unit": "%" if "0.8" in what else "",
            }
            if what.endswith("max"):
                yield Row(what=what, value=max(each.values()), n=len(each), each=each, **names)
            else:
                yield mean_row(what, each=each, **names)


def sampler_of(method: str, samplers: Mapping[str, Any]) -> Any:
    """Return the sampler that takes what a method sends."""
    kinds = {"base": "base", "paca": "paca", **dict.fromkeys(BESIDE, "lora-adapter")}
    return samplers[kinds.get(method, "merged")]


def reset(sampler: Any, method: str, path: str | None = None) -> None:
    """Bring the base's weights back into a sampler."""
    if method == "paca":
        getattr(sampler, "receiver", sampler.transport).revert()
    elif method not in ("base", *BESIDE):
        sampler.write(load(path).named_parameters())
    gc.collect()


def measure_served(samplers: Mapping[str, Any], args: Any) -> list[Row]:
    """Compare what synced samplers say of fixed tokens with what new ones of a merged model say."""
    ids, rows, base = text_ids(10**6, 16, 64), list[Row](), dict(load().named_parameters())
    for rank in args.ranks:
        for method in ("paca", "lora", "lora-adapter"):
            sampler = sampler_of(method, samplers)
            if sampler.name == "vLLM" and method == "lora-adapter":
                continue  # vLLM 0.32 cannot score prompts with an adapter on a CPU
            trainer = Trainer(method, load(), 0, rank)
            sync, names = Sync(trainer, sampler), {"method": method, "setting": f"r = {rank}"}
            for number in range(1, args.syncs + 1):
                trainer.walk(number)
                sync()
                if number not in (1, args.syncs):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    new = sampler.score_anew(merged_folder(trainer, folder), ids)
                distance = (sampler.score(ids) - new).abs().double()
                for kind, value in (("mean", distance.mean()), ("largest", distance.max())):
                    what = f"{kind} difference, {number} syncs"
                    rows.append(Row(what=what, value=float(value), n=distance.numel(), **names))
            with trainer.model.disable_adapter():
                own = dict(trainer.tensors(is_merged=False))
            changed = sum(int((own[n] != p).sum()) for n, p in base.items())
            share = 100 * changed / sum(p.numel() for p in base.values())
            what = f"changed elements of the base, {args.syncs} syncs"
            rows.append(Row(what=what, value=share, unit="%", **names))
            reset(sampler, method)
    return rows


def merged_folder(trainer: Trainer, folder: str) -> str:
    """Write what a user would serve, the adapter merged into the base; return where it is."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    adapter = Path(folder, "adapter")
    trainer.model.save_pretrained(str(adapter))
    model = PeftModel.from_pretrained(load(), str(adapter)).merge_and_unload()
    model.save_pretrained(f"{folder}/merged")
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(f"{folder}/merged")
    return f"{folder}/merged"


def same_weights(trainer: Trainer, sampler: Transformers) -> bool:
    """Whether a sampler multiplies with just what the training pass multiplies with, by bits."""
    model = trainer.model
    if trainer.method == "paca":  # it multiplies with what a merge writes
        model = copy.deepcopy(model).merge_and_unload()
    used = dict(model.named_parameters())
    held = dict(sampler.model.named_parameters())
    return used.keys() == held.keys() and all(
        tensor.dtype == held[name].dtype and torch.equal(tensor, held[name])
        for name, tensor in used.items()
    )


def measure_syncs(args: Any) -> list[Row]:
    """Return bytes and times of every method with transformers' generation."""
    make = partial(Transformers, base_path(), rank=RANK)
    methods = [name for name in METHODS if name != "base"]
    syncs = {m: Sync(Trainer(m, load(), args.seed), make(method=m)) for m in methods}
    runs = {method: one.step_and_sync for method, one in syncs.items()}
    times = alternate(runs, seconds=0, min_rounds=args.rounds, num_warmup=1)
    rows = []
    for method, one in syncs.items():
        names: dict[str, Any] = {"method": method, "setting": "transformers"}
        rows.append(time_row(times[method], what="sync", **names))
        if method not in ("swap", "elements"):
            same = same_weights(one.trainer, one.sampler)
            rows.append(counted("the trainer's weights, bit for bit", value=int(same), **names))
    paca, elements = (statistics.median(syncs[m].num_bytes[1:]) for m in ("paca", "elements"))
    rows.append(time_row(syncs["paca"].packing[1:], what="compressing", method="paca"))
    model = load()
    shares = {
        "paca": paca / syncs["paca"].num_bytes[0],
        "elements": elements / _ELEMENT_BYTES / model.num_parameters(),
    }
    rows += [Row(what="share sent", method=m, value=100 * v, unit="%") for m, v in shares.items()]
    rows += count(model, MODEL, RANK, shares)
    for name in COMPUTED:
        rows += count(make_skeleton(load_config(name), name, torch.bfloat16), name, RANK, shares)
    samplers = {"base": make(method="base"), "paca": syncs["paca"].sampler}
    samplers["lora-adapter"] = syncs["lora-adapter"].sampler
    return rows + token_rows(samplers, text_ids(0, 16, 8), args)


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


def count(model: Any, name: str, rank: int, shares: Mapping[str, float]) -> list[Row]:
    """Return the bytes of a model's syncs by its shapes, and by shares that were measured."""
    num_elements = model.num_parameters()
    layers = [one for one in model.base_model.modules() if isinstance(one, nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    found = dict.fromkeys(("swap", "lora", "full"), 2 * num_elements)
    found["lora-adapter"] = found["lora-bf16"] = 2 * rank * (inputs + outputs)
    found["lora-adapter, r = 8"] = rank * (inputs + outputs)
    rows = [counted(SENT, method, size, "bytes", model=name) for method, size in found.items()]
    columns = 2 * rank * outputs
    rows.append(counted(COMPLETE, "paca", columns, "bytes", model=name))
    partial_ = {"paca": columns, "elements": _ELEMENT_BYTES * num_elements}
    origin: Any = "measured" if name == MODEL else "simulated"
    return rows + [
        Row(what=SENT, method=m, value=shares[m] * size, unit="bytes", model=name, origin=origin)
        for m, size in partial_.items()
    ]


def measure(args: Any) -> list[Row]:
    """Return every row."""
    make: Callable[..., Any] = Transformers
    if args.has_vllm:
        from benchmarks.rl_vllm import Vllm as make
    rows = measure_syncs(args)
    kinds = ("base", "paca", "lora-adapter", "merged")
    samplers = {kind: make(base_path(), kind, RANK) for kind in kinds}
    try:
        rows += measure_served(samplers, args)
        rows += measure_drawn(samplers, args)
        if args.has_vllm:
            rows += token_rows(
                {kind: samplers[kind] for kind in kinds[:-1]}, text_ids(0, 16, 8), args
            )
    finally:
        for sampler in samplers.values():
            sampler.close()
    return rows


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, tokens, seeds, syncs")
    args = parser.parse_args(options)
    args.ranks, args.has_vllm = RANKS, importlib.util.find_spec("vllm") is not None
    quick, whole = (3, 16, 2, 5), (10, 128, 5, 100)
    args.rounds, args.drawn, args.seeds, args.syncs = quick if args.quick else whole
    how = (
        f"SmolLM2-135M-Instruct, bfloat16, all linear layers, r = {RANK} where nothing else is "
        f"said. Medians of {args.rounds} syncs, a training step before each. Drawn: 16 answers of "
        f"{args.drawn} tokens for each of {args.seeds} seeds, after {args.rounds} steps. Served: "
        f"the same 1,008 tokens, a random step of each trained value before each of {args.syncs} "
        "syncs. Sizes of larger models by their shapes"
    )
    name = "rl_sync" if args.has_vllm and not args.quick else "rl_sync-part"
    record(name, how, lambda: measure(args), args, options, METHODS)
    if not args.has_vllm:
        print("vLLM is not installed here: transformers' generation alone was measured.")


if __name__ == "__main__":
    sys.exit(main())
