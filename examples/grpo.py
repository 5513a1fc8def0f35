"""Teach a real language model a task by rewards alone, and show what changed: `make demo-rl`.

SmolLM2-135M-Instruct learns to reverse a list of words (reasoning-gym makes and scores them): by a
short SFT what an answer looks like, then by GRPO, measured on problems that neither saw.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

TASK, NUM_PROMPTS, NUM_SOLVED, MAX_NEW_TOKENS = "word_sequence_reversal", 2000, 200, 12
WORDS = {"min_words": 3, "max_words": 3}
QUIET = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
# The list alone: a chat's turns, and the words before it, would be most of the tokens.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'].split(': ')[-1] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def main() -> None:
    """Measure, SFT, measure, GRPO, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", metavar="DIR", default="demo-rl-output", help="gets a folder (%(default)s)")
    add("--steps", type=int, default=60, help="steps of GRPO (%(default)s)")
    add("--held-out", type=int, default=200, help="held-out problems (%(default)s)")
    add("--seed", type=int, default=0, help="seed of problems, columns, samples (%(default)s)")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    options = parser.parse_args()
    output = Path(options.output, time.strftime("%Y-%m-%d-%H%M%S"))  # always a new folder
    output.mkdir(parents=True)

    warnings.simplefilter("ignore", SyntaxWarning)  # of what reasoning-gym imports, compiled anew
    import reasoning_gym
    from packaged import prepare
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    seed = 1_000_000 * options.seed  # problem i of a seed is made from their sum
    known = reasoning_gym.create_dataset(TASK, seed=seed, size=NUM_PROMPTS, **WORDS)
    other = reasoning_gym.create_dataset(TASK, seed=seed + 500_000, size=NUM_PROMPTS, **WORDS)
    seen = {one["question"] for one in known}
    held_out = [one for one in other if one["question"] not in seen][: options.held_out]
    rewards: dict[str, dict[str, float]] = {}

    def measure(stage: str, model: str, adapter: Path | None = None) -> None:
        for kind, answers in ask(model, adapter, held_out, options.seed).items():
            reward = statistics.fmean(map(other.score_answer, answers, held_out))
            rewards.setdefault(stage, {})[kind] = reward
            print(f"\n{stage}, {kind}: mean reward {reward:.3f} of {len(held_out)} new problems")
            for problem, answer in list(zip(held_out, answers, strict=True))[:3]:
                print(f"  {', '.join(problem['metadata']['words'])} -> {answer!r}")

    base = options.model or str(prepare("smollm2"))
    measure("before", base)
    start = fine_tune(base, [known[i] for i in range(NUM_SOLVED)], output, options.seed)
    measure("after SFT", start)
    learn(start, known, output, options)
    measure("after GRPO", start, output / "grpo")
    (output / "demo-rl.json").write_text(json.dumps(vars(options) | {"rewards": rewards}))
    print(f"\nThe rewards over the steps are in {output / 'grpo' / 'reward.png'}. One seed.")


def fine_tune(base: str, solved: list[dict], output: Path, seed: int) -> str:
    """Learn from solved problems what an answer looks like; return the merged model."""
    from pacatune.training import RunConfig, train

    with (output / "solved.jsonl").open("w", encoding="utf-8") as file:
        for one in solved:
            turns = {"user": one["question"], "assistant": one["answer"]}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    options = {"num_train_epochs": 3, "learning_rate": 2e-3, "seed": seed}
    run = RunConfig(
        model={"path": base},
        data={"path": file.name, "chat_template": TEMPLATE},
        training={"output_dir": str(output / "sft"), **options, **QUIET},
    )
    train(run)
    model, tokenizer = load(base, output / "sft")
    model.merge_and_unload().save_pretrained(output / "start")
    tokenizer.save_pretrained(output / "start")
    return str(output / "start")


def learn(start: str, problems, output: Path, options: argparse.Namespace) -> None:
    """Learn from rewards of sampled answers."""
    from pacatune.training import RunConfig, train

    with (output / "problems.jsonl").open("w", encoding="utf-8") as file:
        for problem in problems:
            prompt = [{"role": "user", "content": problem["question"]}]
            file.write(json.dumps({"prompt": prompt, "problem": problem}) + "\n")

    def is_right(completions, problem, **columns) -> list[float]:
        answers = (messages[-1]["content"].strip() for messages in completions)
        return list(map(problems.score_answer, answers, problem))

    run = RunConfig(
        task="grpo",
        model={"path": start},
        data={"path": file.name, "chat_template": TEMPLATE},
        reward=is_right,
        training={
            "output_dir": str(output / "grpo"),
            "max_steps": options.steps,
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": MAX_NEW_TOKENS,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "beta": 0.0,
            "logging_steps": 1,
            "seed": options.seed,
            **QUIET,
        },
    )
    train(run)


def load(path: str, adapter: Path | None):
    """Return a model, with an adapter or without, and its tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(path, padding_side="left")


def ask(path: str, adapter: Path | None, problems: list[dict], seed: int) -> dict[str, list[str]]:
    """Return the model's likeliest answers, and sampled ones."""
    from transformers import set_seed

    set_seed(seed)
    model, tokenizer = load(path, adapter)
    chats = [[{"role": "user", "content": problem["question"]}] for problem in problems]
    options = {"padding": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(chats, chat_template=TEMPLATE, **options)
    answers = {}
    for kind, how in (
        ("greedy", {"do_sample": False}),
        ("sampled", {"do_sample": True, "top_k": 0}),
    ):
        tokens = model.generate(**inputs, **how, max_new_tokens=MAX_NEW_TOKENS)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers[kind] = [text.strip() for text in texts]
    return answers


if __name__ == "__main__":
    main()
