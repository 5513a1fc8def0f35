"""The demo of reinforcement learning: a short SFT, then GRPO, and what a sampler's sync costs.

The task is chain_sum of reasoning-gym. The format of answers is learned first, on few solved
problems; GRPO then learns from rewards alone. Rewards are measured on problems that neither saw.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pacatune.files.result_folder import ResultFolder

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.data import PromptDataConfig
    from pacatune.training import GrpoRunConfig, RunConfig

TASK = "reasoning-gym:chain_sum"
OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
# The expression alone: a chat's turns, and the words before it, would be most of the tokens.
TEMPLATE = "{% for message in messages %}{{ message['content'].split(': ')[-1] }}{% endfor %}"
NUM_SOLVED, NUM_PROMPTS, NUM_HELD_OUT = 200, 2000, 200
NUM_ANSWERS, NUM_GENERATIONS = 32, 8
MAX_ANSWER_TOKENS = 6
RANK = 16
SFT_LEARNING_RATE, SFT_BATCH_SIZE = 2e-3, 8
LEARNING_RATES = {"paca": 5e-4, "lora": 5e-4}
LORA_STEPS = 3
_BATCH_SIZE = 50
# reasoning-gym makes item i of a seed from their sum.
_SEEDS = 1_000_000


def result_folder(path: Path) -> ResultFolder:
    """Return the folder of the demo's results; its runs replace their own folders in it."""
    return ResultFolder(path=path, mark="demo-rl.json", kind="a demo of reinforcement learning")


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Held-out problems, and what scores answers to them."""

    data: "PromptDataConfig"
    indices: list[int]
    """Numbers among those that reasoning-gym makes from `data`."""
    prompts: list[str]
    """As the model sees them."""

    def scores(self, answers: Sequence[str]) -> list[float]:
        """Return the reward of one answer to each problem."""
        from pacatune.data.prompts import INDEX
        from pacatune.training.rewards import make_verifier

        verify = make_verifier(self.data)
        return verify(completions=list(answers), **{INDEX: self.indices})


def prompt_of(question: str) -> str:
    """Return what the model sees of a question, as `TEMPLATE` writes it."""
    return question.split(": ")[-1]


def training_prompts(seed: int) -> "PromptDataConfig":
    """Return what GRPO trains on; the first of them are solved for the SFT."""
    from pacatune.training import PromptDataConfig

    return PromptDataConfig(
        path=TASK,
        seed=seed * _SEEDS,
        size=NUM_PROMPTS,
        options=dict(OPTIONS),
        eval_fraction=0.0,
        chat_template=TEMPLATE,
    )


def write_solved(data: "PromptDataConfig", path: Path) -> None:
    """Write solved problems as the data of the SFT."""
    from pacatune.data.prompts import reasoning_gym_data

    made = reasoning_gym_data(data)
    rows = {made[i]["question"]: made[i]["answer"] for i in range(len(made))}
    with path.open("w", encoding="utf-8") as file:
        for question in list(rows)[:NUM_SOLVED]:
            row = {"prompt": prompt_of(question), "completion": f" {rows[question]}"}
            file.write(json.dumps(row) + "\n")


def held_out_problems(data: "PromptDataConfig", number: int) -> Problems:
    """Return problems that are not among those of `data`."""
    from dataclasses import replace

    from pacatune.data.prompts import reasoning_gym_data

    known = reasoning_gym_data(data)
    seen = {known[i]["question"] for i in range(len(known))}
    other = replace(data, seed=data.seed + _SEEDS // 2)
    made = reasoning_gym_data(other)
    found: dict[str, int] = {}
    for i in range(len(made)):
        if made[i]["question"] not in seen:
            found.setdefault(made[i]["question"], i)
    chosen = list(found)[:number]
    return Problems(
        data=other,
        indices=[found[question] for question in chosen],
        prompts=[prompt_of(question) for question in chosen],
    )


def sft_run(model: str, solved: Path, folder: Path, *, seed: int, dtype: str) -> "RunConfig":
    """Return the run that learns the answers' format."""
    from pacatune.training import DataConfig, ModelConfig, RunConfig, TrainingConfig

    training = TrainingConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=SFT_BATCH_SIZE,
        learning_rate=SFT_LEARNING_RATE,
        **_common(seed, dtype),
    )
    run = RunConfig(
        method="paca",
        model=ModelConfig(path=model, dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(path=str(solved), eval_fraction=0.0),
        training=training,
    )
    run.paca.r = run.paca.paca_alpha = RANK
    run.paca.random_seed = seed
    return run


def grpo_runs(
    model: str,
    data: "PromptDataConfig",
    folder: Path,
    *,
    num_steps: int,
    seed: int,
    dtype: str,
    learning_rate: float | None = None,
) -> "dict[str, GrpoRunConfig]":
    """Return the runs by method; LoRA's is a few steps, only for the gap after training."""
    from pacatune.training import GrpoRunConfig, GrpoTrainingConfig, ModelConfig

    runs = {}
    for method, steps in (("paca", num_steps), ("lora", min(num_steps, LORA_STEPS))):
        training = GrpoTrainingConfig(
            output_dir=str(folder / method),
            max_steps=steps,
            per_device_train_batch_size=NUM_ANSWERS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_ANSWER_TOKENS,
            learning_rate=learning_rate or LEARNING_RATES[method],
            beta=0.0,
            logging_steps=1,
            warmup_steps=0,
            lr_scheduler_type="constant",
            **_common(seed, dtype),
        )
        held = ModelConfig(path=model, dtype=dtype)  # type: ignore[arg-type]
        runs[method] = GrpoRunConfig(method=method, model=held, data=data, training=training)
    runs["paca"].paca.r = runs["paca"].paca.paca_alpha = RANK
    runs["paca"].paca.random_seed = seed + 1
    runs["lora"].lora.r = runs["lora"].lora.lora_alpha = RANK
    runs["lora"].lora.lora_dropout = 0.0
    return runs


def _common(seed: int, dtype: str) -> dict[str, Any]:
    return {
        "bf16": None if dtype == "auto" else dtype == "bfloat16",
        "use_cpu": dtype != "auto",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int | None = None
) -> list[str]:
    """Return an answer to each prompt: the likeliest tokens, or sampled ones with a `seed`."""
    if seed is not None:
        torch.manual_seed(seed)
    found: list[str] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        inputs = _encode(tokenizer, prompts[start : start + _BATCH_SIZE]).to(model.device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=seed is not None,
            temperature=1.0 if seed is not None else None,
            top_k=0 if seed is not None else None,
            top_p=1.0 if seed is not None else None,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return found


def _encode(tokenizer: Any, prompts: Sequence[str]) -> Any:
    return tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")


def load(model: str, adapter: Path | None = None, dtype: Any = "auto") -> tuple[Any, Any]:
    """Return a model, with an adapter if there is one, and its tokenizer."""
    from pacatune.adapters.base import load_base, load_tokenizer
    from pacatune.adapters.folder import open_adapter
    from pacatune.adapters.loading import attach

    held: Any = load_base(model, task_type="CAUSAL_LM", dtype=dtype, device="auto")
    tokenizer: Any = load_tokenizer(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        held, _ = attach(held, open_adapter(adapter))
    return held.eval(), tokenizer


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Mean rewards on the held-out problems."""

    greedy: float
    sampled: float
    examples: list[str]
    """The greedy answers to the first problems."""


def measure_rewards(
    model: str, adapter: Path | None, problems: Problems, *, seed: int, dtype: str
) -> Rewards:
    """Answer each held-out problem once greedily and once by sampling."""
    from pacatune import resident

    held, tokenizer = load(model, adapter, dtype)
    with resident(held):
        greedy = answers(held, tokenizer, problems.prompts)
        sampled = answers(held, tokenizer, problems.prompts, seed=seed)
    means = [sum(s) / len(s) for s in map(problems.scores, (greedy, sampled))]
    return Rewards(greedy=means[0], sampled=means[1], examples=greedy[:3])


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far the sampler's log-probabilities are from the trainer's, in bfloat16."""

    weights_equal: bool
    """Whether the sampler's weights have the bits that the trainer computes with."""
    by_weights: float
    """Mean |log p_train - log p_sample| per token, both by one pass over the whole text."""
    as_sampled: float
    """The same against the log-probabilities of generation, whose kernels round differently."""
    num_tokens: int


def measure_gap(model: str, adapter: Path, prompts: Sequence[str], *, seed: int) -> Gap:
    """Sample from the merged model and compare with the adapted one, both in bfloat16."""
    from pacatune import resident
    from pacatune.training.rl import SampledLogProbs

    sampler, tokenizer = load(model, adapter, "bfloat16")
    sampler = sampler.merge_and_unload(safe_merge=False)
    trainer, _ = load(model, adapter, "bfloat16")
    inputs = _encode(tokenizer, prompts).to(sampler.device)
    torch.manual_seed(seed)
    kept = SampledLogProbs(1.0)
    with torch.no_grad(), kept.listening(sampler):
        tokens = sampler.generate(
            **inputs,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    start = inputs["input_ids"].shape[1]
    new = tokens[:, start:]
    ended = (new == tokenizer.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0
    attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    served = _log_probs(sampler, tokens, attention, start)
    pairs = _weight_pairs(trainer, sampler)
    with resident(trainer):
        trained = _log_probs(trainer, tokens, attention, start)
        equal = all(torch.equal(own, other) for own, other in pairs)
    sampled = kept.matrix(new.shape[1]).to(trained.device)
    return Gap(
        weights_equal=equal,
        by_weights=float((trained - served).abs()[mask].mean()),
        as_sampled=float((trained - sampled).abs()[mask].mean()),
        num_tokens=int(mask.sum()),
    )


@torch.no_grad()
def _log_probs(model: Any, tokens: Tensor, attention: Tensor, start: int) -> Tensor:
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=tokens, attention_mask=attention, position_ids=positions)
    logits = output.logits[:, start - 1 : -1].float()
    chosen: Tensor = logits.log_softmax(-1).gather(2, tokens[:, start:, None])[..., 0]
    return chosen


def _weight_pairs(trainer: Any, sampler: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of the trainer's adapted layers, each with the sampler's.

    Taken before `resident` begins, the trainer's show what its layers then multiply by.
    """
    served = dict(sampler.named_modules())
    return [
        (module.get_base_layer().weight, served[name.removeprefix("base_model.model.")].weight)
        for name, module in trainer.named_modules()
        if hasattr(module, "get_base_layer")
    ]


def sync_bytes(model: str, adapter: Path) -> dict[str, int]:
    """Count what a sync sends in bfloat16: all weights, those that LoRA merges, the columns."""
    held, _ = load(model, adapter)
    layers = [one.get_base_layer() for one in held.modules() if hasattr(one, "get_base_layer")]
    base = held.get_base_model()
    # Buffers and adapters aside; tied weights count once.
    deltas = [p for name, p in held.named_parameters() if "paca_" in name]
    total = sum(p.numel() for name, p in base.named_parameters() if "paca_" not in name)
    return {
        "full": 2 * total,
        "lora_merged": 2 * sum(layer.weight.numel() for layer in layers),
        "paca": 2 * sum(delta.numel() for delta in deltas),
    }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo found."""

    rewards: dict[str, Rewards]
    """Stage -> rewards on the held-out problems."""
    sync_bytes: dict[str, int]
    gaps: dict[str, Gap]
    """Method -> gap between trainer and sampler."""
    num_held_out: int
    train_rewards: list[tuple[int, float]]
    """Step of GRPO -> mean reward of its answers."""
    log_gap: float
    """Mean of |log p_train - log p_sample| that the run of GRPO logged, in its own dtype."""

    def notes(self) -> list[str]:
        """Say what became of the reward."""
        before, after = (self.rewards[name] for name in ("after SFT", "after GRPO"))
        return [
            f"By GRPO the reward of {kind} answers {_change(*pair, self.num_held_out)}."
            for kind, pair in (
                ("sampled", (before.sampled, after.sampled)),
                ("greedy", (before.greedy, after.greedy)),
            )
        ] + ["docs/decisions.md says what else was tried."]


def _change(before: float, after: float, number: int) -> str:
    """Say whether a mean of rewards in [0, 1] rose by more than chance explains."""
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / number)
    verb = "rose" if after > before else "did not rise"
    if verb == "rose" and after - before <= 2 * error:
        verb = "rose by no more than two standard errors"
    return f"{verb}: {before:.3f}, then {after:.3f} on {number} problems"


def run_demo(
    model: str,
    folder: Path,
    *,
    num_steps: int,
    num_held_out: int,
    seed: int,
    dtype: str,
    console: "Console",
) -> Result:
    """Do all of it in a folder that `result_folder` has opened."""
    from pacatune.adapters.merge import merge
    from pacatune.training import train

    data = training_prompts(seed)
    problems = held_out_problems(data, num_held_out)
    rewards: dict[str, Rewards] = {}

    def measure(stage: str, base: str, adapter: Path | None = None) -> None:
        found = measure_rewards(base, adapter, problems, seed=seed, dtype=dtype)
        rewards[stage] = found
        console.print(
            f"{stage}: held-out reward {found.greedy:.3f} greedy, {found.sampled:.3f} sampled"
        )

    measure("before", model)
    console.rule("[bold]SFT", align="left")
    write_solved(data, folder / "solved.jsonl")
    sft = sft_run(model, folder / "solved.jsonl", folder / "sft", seed=seed, dtype=dtype)
    train(sft, overwrite=True, console=console)
    start = folder / "start"
    shutil.rmtree(start, ignore_errors=True)  # what an earlier demo merged
    merge(model, folder / "sft", start, verify=False)
    measure("after SFT", str(start))
    runs = grpo_runs(str(start), data, folder, num_steps=num_steps, seed=seed, dtype=dtype)
    reports: dict[str, Any] = {}
    for method, run in runs.items():
        console.rule(f"[bold]GRPO, {method}", align="left")
        reports[method] = train(run, overwrite=True, console=console)
        if method == "paca":
            measure("after GRPO", str(start), folder / "paca")
    metrics = reports["paca"].train_metrics
    logged = [value for _, value in metrics["sampling/sampling_logp_difference/mean"]]
    some = problems.prompts[:_BATCH_SIZE]
    return Result(
        rewards=rewards,
        sync_bytes=sync_bytes(str(start), folder / "paca"),
        gaps={name: measure_gap(str(start), folder / name, some, seed=seed) for name in runs},
        num_held_out=len(problems.prompts),
        train_rewards=metrics["reward"],
        log_gap=sum(logged) / len(logged),
    )
