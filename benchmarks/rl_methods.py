"""What `rl_sync` and `rl_run` compare: trainers, samplers of transformers, and what syncs them."""

import copy
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.swap import merge_swapped, swap_layers
from pacatune.measure.methods import Contender, adapt
from pacatune.sync import ColumnReceiver, ColumnSource, InProcess
from pacatune.sync.message import Columns, ColumnSet, Positions, to_wire

RANK = 16
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
SENT = "sent per sync"
BESIDE = ("lora-adapter", "lora-bf16")
ELEMENT_BYTES = 4 + 2
"""A position and a value."""
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


class Matrices:
    """LoRA's matrices on the wire, as columns are there: compressed where a sync follows one."""

    def __init__(self, model: Any) -> None:
        self.own = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        sets = tuple(
            ColumnSet(
                name=name,
                parameter=name,
                dim=1,
                shape=tuple(matrix.shape),
                dtype=torch.bfloat16,
                indices=torch.arange(matrix.shape[1]),
            )
            for name, matrix in self.own.items()
        )
        self.positions = Positions(sets=sets, shapes={}, run="lora")
        self.places = self.positions.layout(range(len(sets)))
        self.last: dict[str, Tensor] = {}

    def send(self) -> int:
        """Return how many bytes a sync has."""
        now = {name: matrix.bfloat16() for name, matrix in self.own.items()}
        columns = Columns(
            version=self.positions.version,
            number=1,
            since=0,
            ordinals=tuple(range(len(now))),
            buffer=torch.cat(
                [now[one.name].view(torch.uint8).view(-1) for _, one, _ in self.places]
            ),
            follows=(self.places, self.last) if self.last else None,
        )
        self.last = now
        return to_wire(columns)[1].nbytes


class Sync:
    """Brings what a trainer holds to its sampler, and counts it."""

    def __init__(self, trainer: Trainer, sampler: Any) -> None:
        self.trainer, self.sampler = trainer, sampler
        self.num_bytes: list[int] = []
        self.packing: list[float] = []
        self.source: ColumnSource | None = None
        self.snapshot: dict[str, Tensor] = {}
        method = trainer.method
        if method in BESIDE:
            self.matrices = Matrices(trainer.model)
        elif method.startswith("paca"):
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
            self.sampler.write_adapter(self.trainer.model)
        else:
            num_bytes = self.sampler.write(self.trainer.tensors())
        end = time.perf_counter()
        if self.source is not None:  # as HTTP and files carry it
            num_bytes = to_wire(columns)[1].nbytes
            self.packing.append(time.perf_counter() - end)
        elif self.trainer.method in BESIDE:
            num_bytes = self.matrices.send()
        self.num_bytes.append(num_bytes)
        return end - start

    def _send_elements(self) -> int:
        count = 0
        for name, new in self.trainer.tensors():
            places = (new != self.snapshot[name]).view(-1).nonzero()[:, 0]
            self.sampler.write_elements(name, places, new.view(-1)[places])
            self.snapshot[name] = new
            count += len(places)
        return ELEMENT_BYTES * count

    def step_and_sync(self) -> float:
        """Train between two syncs."""
        self.trainer.step()
        return self()


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
