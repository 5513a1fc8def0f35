"""The demo of reinforcement learning: a short SFT, then GRPO, and what a sampler's sync costs.

The task, made and scored by reasoning-gym, is to reverse a list of words. The SFT learns from few
solved problems what an answer looks like; GRPO then learns from rewards alone. Rewards are measured
on problems that neither saw.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pacatune.files.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from pacatune.data import PromptDataConfig
    from pacatune.sync.message import Columns, Positions
    from pacatune.training import GrpoRunConfig, RunConfig

TASK = "reasoning-gym:word_sequence_reversal"
OPTIONS = {"min_words": 3, "max_words": 3}
# The list alone: a chat's turns, and the words before it, would be most of the tokens.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'].split(': ')[-1] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
NUM_SOLVED, NUM_PROMPTS = 200, 2000
NUM_ANSWERS, NUM_GENERATIONS = 32, 8
MAX_ANSWER_TOKENS = 12
RANK = 16
SFT_LEARNING_RATE, SFT_EPOCHS, SFT_BATCH_SIZE = 2e-3, 3, 8
LEARNING_RATE = 1e-3
LORA_STEPS = 3
# Problems whose sampled answers show the gap between trainer and sampler.
NUM_COMPARED = 20
_BATCH_SIZE = 50
# reasoning-gym makes item i of a seed from their sum.
_SEEDS = 1_000_000

Kind = Literal["greedy", "sampled"]
TEMPERATURES: dict[Kind, float] = {"greedy": 0.0, "sampled": 1.0}
"""How answers are chosen when rewards are measured; GRPO samples."""


def result_folder(path: Path) -> OwnedFolder:
    """Return the folder of the demo's results; its runs replace their own folders in it."""
    return OwnedFolder(path=path, kind="a demo of reinforcement learning")


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


def solved_problems(data: "PromptDataConfig") -> str:
    """Return solved problems, the data of the SFT, as JSON lines."""
    from pacatune.data.prompts import reasoning_gym_data

    made = reasoning_gym_data(data)
    lines = []
    for one in map(made.__getitem__, range(NUM_SOLVED)):
        question = {"role": "user", "content": one["question"]}
        answer = {"role": "assistant", "content": one["answer"]}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    return "".join(lines)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Held-out problems, and what scores answers to them."""

    data: "PromptDataConfig"
    indices: list[int]
    """Numbers among those that reasoning-gym makes from `data`."""
    questions: list[str]

    def scores(self, answers: Sequence[str]) -> list[float]:
        """Return the reward of one answer to each problem."""
        from pacatune.data.prompts import INDEX
        from pacatune.training.rewards import make_verifier

        return make_verifier(self.data)(completions=list(answers), **{INDEX: self.indices})


def held_out_problems(data: "PromptDataConfig", number: int) -> Problems:
    """Return problems that are not among those of `data`."""
    from pacatune.data.prompts import reasoning_gym_data

    other = replace(data, seed=data.seed + _SEEDS // 2)
    known, made = (
        [one["question"] for one in map(found.__getitem__, range(len(found)))]
        for found in map(reasoning_gym_data, (data, other))
    )
    seen = set(known)
    indices = [i for i, question in enumerate(made) if question not in seen][:number]
    return Problems(data=other, indices=indices, questions=[made[i] for i in indices])


def sft_run(model: str, solved: Path, folder: Path, *, seed: int, dtype: str) -> "RunConfig":
    """Return the run that learns what an answer looks like."""
    from pacatune.experiments.demo import model_and_options
    from pacatune.training import DataConfig, RunConfig, TrainingConfig

    base, options = model_and_options(model, dtype, seed)
    training = TrainingConfig(
        output_dir=str(folder),
        num_train_epochs=SFT_EPOCHS,
        per_device_train_batch_size=SFT_BATCH_SIZE,
        learning_rate=SFT_LEARNING_RATE,
        eval_strategy="no",
        **options,
    )
    data = DataConfig(path=str(solved), eval_fraction=0.0, chat_template=TEMPLATE)
    run = RunConfig(method="paca", model=base, data=data, training=training)
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
) -> "dict[str, GrpoRunConfig]":
    """Return the runs by method; LoRA's is a few steps, only for the gap after training."""
    from pacatune.experiments.demo import model_and_options
    from pacatune.training import GrpoRunConfig, GrpoTrainingConfig

    runs = {}
    for method, steps in (("paca", num_steps), ("lora", min(num_steps, LORA_STEPS))):
        base, options = model_and_options(model, dtype, seed)
        training = GrpoTrainingConfig(
            output_dir=str(folder / method),
            max_steps=steps,
            per_device_train_batch_size=NUM_ANSWERS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_ANSWER_TOKENS,
            learning_rate=LEARNING_RATE,
            beta=0.0,
            logging_steps=1,
            warmup_steps=0,
            lr_scheduler_type="linear",
            eval_strategy="no",
            **options,
        )
        runs[method] = GrpoRunConfig(method=method, model=base, data=data, training=training)
    runs["paca"].paca.r = runs["paca"].paca.paca_alpha = RANK
    runs["paca"].paca.random_seed = seed + 1
    runs["lora"].lora.r = runs["lora"].lora.lora_alpha = RANK
    runs["lora"].lora.lora_dropout = 0.0
    return runs


def answers(
    model: str, adapter: Path | None, questions: Sequence[str], *, seed: int
) -> dict[Kind, list[str]]:
    """Return an answer to each question, by each way of choosing."""
    from pacatune.adapters.generation import TextGenerator
    from pacatune.adapters.sampling import Sampling

    generator = TextGenerator(model, adapter, device="auto", chat_template=TEMPLATE)
    prompts = [generator.encode(question) for question in questions]
    found: dict[Kind, list[str]] = {kind: [] for kind in TEMPERATURES}
    for kind, temperature in TEMPERATURES.items():
        samplings = [
            Sampling(max_new_tokens=MAX_ANSWER_TOKENS, temperature=temperature, seed=seed + number)
            for number in range(len(prompts))
        ]
        for start in range(0, len(prompts), _BATCH_SIZE):
            part = slice(start, start + _BATCH_SIZE)
            batch = generator.generate_batch(prompts[part], samplings[part])
            found[kind] += [one.text.strip() for one in batch]
    return found


def sync_columns(trainer: "PeftModel", sampler: nn.Module) -> dict[str, int]:
    """Send the columns to a sampler that holds the base; count bytes, and those of other syncs."""
    from pacatune.sync import ColumnReceiver, ColumnSource, InProcess

    transport, receiver = InProcess(), ColumnReceiver(sampler)
    source = ColumnSource(trainer, torch.bfloat16)
    columns = source.send(transport)
    receiver.receive(transport)
    positions = source.positions()
    return {
        "full": 2 * sum(parameter.numel() for parameter in sampler.parameters()),
        "lora_merged": 2 * sum(math.prod(one.shape) for one in positions.sets),
        "paca": _num_bytes(columns),
        "paca_positions": _num_bytes(positions),
    }


def _num_bytes(message: "Columns | Positions") -> int:
    from pacatune.sync.message import to_wire

    words, buffer = to_wire(message)
    return len(json.dumps(words)) + buffer.nbytes


def measure_gap(
    trainer: Any, sampler: Any, tokenizer: Any, questions: Sequence[str], *, seed: int
) -> float:
    """Have the sampler answer questions; return the mean |log p_train - log p_sample| per token.

    Both probabilities are those of one pass over question and answer.
    """
    from pacatune import resident

    torch.manual_seed(seed)
    differences: list[float] = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=TEMPLATE,
            return_tensors="pt",
            return_dict=True,
        ).to(trainer.device)
        tokens = sampler.generate(
            **prompt,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.eos_token_id,
        )
        start = prompt["input_ids"].shape[1]
        with resident(trainer):
            trained = _log_probs(trainer, tokens, start)
        differences += (trained - _log_probs(sampler, tokens, start)).abs().tolist()
    return statistics.fmean(differences)


@torch.no_grad()
def _log_probs(model: Any, tokens: Tensor, start: int) -> Tensor:
    """Return the log-probability of each token (1, T) from `start` on."""
    logits = model(input_ids=tokens).logits[0, start - 1 : -1].float()
    chosen: Tensor = logits.log_softmax(-1).gather(1, tokens[0, start:, None])[:, 0]
    return chosen


def compare_samplers(
    model: str, folder: Path, questions: Sequence[str], *, seed: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Serve in bfloat16 what both methods have trained; return the gaps, and bytes of syncs."""
    from pacatune.adapters.loading import load_language_model

    def load(adapter: Path | None) -> Any:
        return load_language_model(model, adapter, dtype="bfloat16", device="auto")

    paca, lora, base = load(folder / "paca"), load(folder / "lora"), load(None).model
    sizes = sync_columns(paca.model, base)
    merged = load(folder / "lora").model.merge_and_unload()
    gaps = {
        name: measure_gap(loaded.model, sampler, loaded.tokenizer, questions, seed=seed)
        for name, loaded, sampler in (("paca", paca, base), ("lora", lora, merged))
    }
    return gaps, sizes


@dataclass(frozen=True, kw_only=True)
class Rise:
    """What GRPO made of the mean reward on the held-out problems."""

    mean: float
    standard_error: float
    """Standard error of the mean, from the differences problem by problem."""

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float]) -> "Rise":
        """Compare rewards of the same problems."""
        rises = [new - old for old, new in zip(before, after, strict=True)]
        # One problem says nothing of the spread, but rewards are in [0, 1].
        spread = statistics.stdev(rises) if len(rises) > 1 else 1.0
        error = spread / math.sqrt(len(rises))
        return cls(mean=statistics.fmean(rises), standard_error=error)

    def __str__(self) -> str:
        """Say whether it is more than chance explains."""
        number = f"{self.mean:+.3f}, standard error {self.standard_error:.3f}"
        if self.mean <= 0:
            return f"did not rise ({number})"
        if self.mean <= 2 * self.standard_error:
            return f"rose by no more than two standard errors ({number})"
        return f"rose ({number})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo found."""

    rewards: dict[str, dict[Kind, float]]
    """Stage -> mean rewards on the held-out problems."""
    rises: dict[Kind, Rise]
    """By GRPO."""
    examples: list[dict[str, str]]
    """Questions of a few held-out problems, and the likeliest answer in each stage."""
    sync_bytes: dict[str, int]
    gaps: dict[str, float]
    """Method -> mean |log p_train - log p_sample| per token, in bfloat16."""
    num_held_out: int
    train_rewards: list[tuple[int, float]]
    """Step of GRPO -> mean reward of its answers."""
    log_gap: float
    """Mean of |log p_train - log p_sample| that the run of GRPO logged, in its own dtype."""

    def notes(self) -> list[str]:
        """Say what became of the reward, and what the gaps leave out."""
        return [
            *(f"By GRPO the reward of {kind} answers {rise}." for kind, rise in self.rises.items()),
            "Generation keeps keys and values, and its kernels round differently: against the "
            f"log-probabilities of generation itself GRPO has logged a gap of {self.log_gap:.1e}.",
        ]


def run_demo(
    model: str,
    output: OwnedFolder,
    *,
    num_steps: int,
    num_held_out: int,
    seed: int,
    dtype: str,
    console: "Console",
) -> Result:
    """Do all of it in a folder of `result_folder` that is ready."""
    from pacatune.adapters.merge import merge
    from pacatune.training import train

    folder, data = output.path, training_prompts(seed)
    problems = held_out_problems(data, num_held_out)
    texts: dict[str, list[str]] = {}
    scores: dict[str, dict[Kind, list[float]]] = {}

    def measure(stage: str, base: str, adapter: Path | None = None) -> None:
        found = answers(base, adapter, problems.questions, seed=seed)
        texts[stage] = found["greedy"]
        scores[stage] = {kind: problems.scores(given) for kind, given in found.items()}
        shown = (f"{statistics.fmean(one):.3f} {kind}" for kind, one in scores[stage].items())
        console.print(f"{stage}: held-out reward {', '.join(shown)}")

    measure("before", model)
    console.rule("[bold]SFT", align="left")
    output.write("solved.jsonl", solved_problems(data))
    sft = sft_run(model, folder / "solved.jsonl", folder / "sft", seed=seed, dtype=dtype)
    train(sft, overwrite=True, console=console)
    start = folder / "start"
    with output.staged() as staging:
        merge(model, folder / "sft", staging / start.name, verify=False)
    measure("after SFT", str(start))
    runs = grpo_runs(str(start), data, folder, num_steps=num_steps, seed=seed, dtype=dtype)
    reports: dict[str, Any] = {}
    for method, run in runs.items():
        console.rule(f"[bold]GRPO, {method}", align="left")
        reports[method] = train(run, overwrite=True, console=console)
    measure("after GRPO", str(start), folder / "paca")
    metrics = reports["paca"].train_metrics
    logged = [value for _, value in metrics["sampling/sampling_logp_difference/mean"]]
    gaps, sizes = compare_samplers(str(start), folder, problems.questions[:NUM_COMPARED], seed=seed)
    return Result(
        rewards={
            stage: {kind: statistics.fmean(one) for kind, one in found.items()}
            for stage, found in scores.items()
        },
        rises={
            kind: Rise.between(scores["after SFT"][kind], scores["after GRPO"][kind])
            for kind in TEMPERATURES
        },
        examples=[
            {"question": question, **{stage: given[i] for stage, given in texts.items()}}
            for i, question in enumerate(problems.questions[:3])
        ],
        sync_bytes=sizes,
        gaps=gaps,
        num_held_out=len(problems.questions),
        train_rewards=metrics["reward"],
        log_gap=statistics.fmean(logged),
    )
