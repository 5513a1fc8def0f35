"""Train by GRPO beside a sampler that gets columns, merged LoRA, or LoRA's matrices.

    sh tools/test_vllm.sh -m benchmarks.rl_run     writes benchmarks/results/rl_run.json

Fewer steps or methods, and a sampler of transformers where there is no vLLM, go to
rl_run-part.json. With `--runs FOLDER`, what was stopped goes on there, and another process can do
other methods meanwhile.

The task is that of examples/grpo.py: three words to reverse, after a short SFT. Each step draws 8
answers to each of 4 problems, takes one step of AdamW on them, and syncs. There is no correction
for what the sampler's log-probabilities differ from the trainer's: that difference is measured.
"""

import functools
import importlib.util
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rl_methods
from benchmarks.results import at_least_1, mean_row, new_parser, record, write_json
from benchmarks.rl_methods import SENT, Sync, Trainer, Transformers, agreement, load, logps_of
from pacatune.reports.rows import Row

METHODS = {
    "paca": "PaCA's columns",
    "paca, 1e-4": "the same at a tenth of the rate",
    "lora": "LoRA, merged, every tensor, unmerged",
    "lora-adapter": "LoRA's matrices, which the sampler adds to each token",
}
RATE = 1e-3  # that of the example; alpha is the rank, so that all scale by 1
_ANSWERS, _PROBLEMS, _NEW = 8, 4, 12
_PARTS = 4
"""Parts of a run whose mean rewards are rows."""


class Problems:
    """Problems whose prompts have equally many tokens, so that nothing need be padded."""

    def __init__(self, path: str, seed: int) -> None:
        import reasoning_gym
        from transformers import AutoTokenizer

        from examples.grpo import TASK, TEMPLATE, WORDS

        self.data = reasoning_gym.create_dataset(TASK, seed=seed * 10**6, size=2000, **WORDS)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        render = functools.partial(
            self.tokenizer.apply_chat_template, chat_template=TEMPLATE, return_dict=False
        )
        by_length = defaultdict(list)
        for one in self.data:
            ids = render([{"role": "user", "content": one["question"]}])
            by_length[len(ids)].append((one, ids))
        self.rows = max(by_length.values(), key=len)

    def batch(self, number: int) -> tuple[list[Any], Tensor]:
        """Return the problems of a step, each as often as it is answered, and (B, T) prompts."""
        start = number * _PROBLEMS
        some = [self.rows[(start + i) % len(self.rows)] for i in range(_PROBLEMS)]
        repeated = [one for one in some for _ in range(_ANSWERS)]
        return [one for one, _ in repeated], torch.tensor([ids for _, ids in repeated])

    def rewards(self, problems: list[Any], answers: Tensor, mask: Tensor) -> Tensor:
        """Return (B,) scores of (B, N) tokens up to the first end."""
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True).strip()
            for row, kept in zip(answers, mask, strict=True)
        ]
        pairs = zip(texts, problems, strict=True)
        return torch.tensor([self.data.score_answer(text, one) for text, one in pairs])


def run(method: str, seed: int, path: str, sampler: Any, steps: int) -> dict[str, list[float]]:
    """Train; return what was seen at each step."""
    name, _, rate = method.partition(", ")
    trainer = Trainer(name, load(path), seed, rate=float(rate or RATE))
    sync, problems, found = Sync(trainer, sampler), Problems(path, seed), defaultdict(list)
    sync()
    for number in range(steps):
        some, prompts = problems.batch(number)
        ids, drawn = sampler.draw(prompts, _NEW, seed * steps + number)
        is_end = ids[:, -_NEW:] == problems.tokenizer.eos_token_id
        mask = (is_end.cumsum(1) - is_end.int()) == 0  # up to the first end, and this
        rewards = problems.rewards(some, ids[:, -_NEW:], mask)
        logps = logps_of(trainer.model.train(), ids)[:, -_NEW:]
        loss = grpo_loss(logps, rewards.view(-1, _ANSWERS), mask)
        trainer.optimizer.param_groups[0]["lr"] = trainer.rate * (1 - number / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        sync()
        found["reward"].append(float(rewards.mean()))
        for what, value in agreement(logps.detach()[mask], drawn[mask]).items():
            found[what].append(value)
    found[SENT] = [float(size) for size in sync.num_bytes[2:]]  # the first two have everything
    rl_methods.reset(sampler, name, path)
    return found


def grpo_loss(logps: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Return GRPO's loss, by tokens (DAPO), of the answers that the model itself has drawn.

    Args:
        logps: (B, N) log-probabilities of their tokens.
        rewards: (P, A), A answers to each of P problems.
        mask: (B, N) which tokens belong to an answer.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    return -(advantages * (logps - logps.detach()).exp() * mask).sum() / mask.sum()


def measure(make: Callable[..., Any], args: Any) -> Iterator[Row]:
    """Train with each method and seed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.runs or Path(temporary)
        path = args.start or start(folder, args.seed)
        samplers = {kind: make(path, kind, rl_methods.RANK) for kind in args.kinds}
        try:
            for method in args.methods:
                runs = {}
                sampler = rl_methods.sampler_of(method.partition(",")[0], samplers)
                for seed in range(args.seeds):
                    file = folder / f"{sampler.name}, {method}, {args.steps} steps, {seed}.json"
                    if not file.exists():
                        write_json(run(method, seed, path, sampler, args.steps), file)
                    runs[f"seed {seed}"] = json.loads(file.read_text(encoding="utf-8"))
                    print(method, seed, f"{statistics.mean(runs[f'seed {seed}']['reward']):.3f}")
                yield from rows_of(method, sampler.name, runs, args.steps)
        finally:
            for sampler in samplers.values():
                sampler.close()


def rows_of(
    method: str, setting: str, runs: dict[str, dict[str, list[float]]], steps: int
) -> Iterator[Row]:
    """Return means over steps, and over seeds with their intervals."""
    names = {"method": method, "setting": setting}
    part = max(steps // _PARTS, 1)
    for first in range(0, min(part * _PARTS, steps), part):
        each = {s: statistics.mean(r["reward"][first : first + part]) for s, r in runs.items()}
        yield mean_row(f"reward, steps {first + 1} to {first + part}", each=each, **names)
    for what in next(iter(runs.values())):
        if what.endswith("max"):
            each = {seed: max(one[what]) for seed, one in runs.items()}
            yield Row(what=what, value=max(each.values()), each=each, n=len(each), **names)
        elif what != "reward":
            each = {seed: statistics.mean(one[what]) for seed, one in runs.items()}
            unit = {SENT: "bytes", "ratios beyond 0.8 to 1.25": "%"}.get(what, "")
            yield mean_row(what, each=each, unit=unit, **names)


def start(folder: Path, seed: int) -> str:
    """Return a model in the folder that knows what an answer looks like, in bfloat16."""
    path = folder / "start"
    if path.exists():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    import reasoning_gym

    from examples.grpo import TASK, WORDS, fine_tune

    solved = reasoning_gym.create_dataset(TASK, seed=5 * 10**8, size=200, **WORDS)
    with tempfile.TemporaryDirectory(dir=folder) as making:
        made = fine_tune(rl_methods.base_path(), list(solved), Path(making), seed)
        model = load(made)
        model.save_pretrained(made)
        Path(made).rename(path)
    return str(path)


def main(options: list[str] | None = None) -> None:
    """Train, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--steps", type=at_least_1, default=200, help="steps of each run")
    add("--seeds", type=at_least_1, default=3)
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--start", metavar="MODEL", help="begin there, without an SFT")
    add("--runs", metavar="FOLDER", type=Path, help="keeps one start, and its runs")
    args = parser.parse_args(options)
    kinds = {"paca": "paca", "lora": "merged", "lora-adapter": "lora-adapter"}
    args.kinds = list(dict.fromkeys(kinds[name.partition(",")[0]] for name in args.methods))
    make: Callable[..., Any] = Transformers
    if importlib.util.find_spec("vllm") is not None:
        from benchmarks.rl_vllm import Vllm as make
    how = (
        f"SmolLM2-135M-Instruct after an SFT, bfloat16, r = {rl_methods.RANK}, {args.steps} steps "
        f"of {_ANSWERS} answers to each of {_PROBLEMS} problems, {args.seeds} seeds, rate {RATE:g} "
        "falling to 0; means over steps"
    )
    is_whole = make is not Transformers and args.steps >= 200 and len(args.methods) == len(METHODS)
    name = "rl_run" if is_whole else "rl_run-part"
    record(name, how, lambda: list(measure(make, args)), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
