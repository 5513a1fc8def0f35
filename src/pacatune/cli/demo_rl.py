"""`pacatune demo-rl`: teach a real model a task by rewards, and show what its sampler costs."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.demo import cache_of, print_dim
from pacatune.cli.options import new_parser, positive, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.experiments.demo_rl import Result

NUM_STEPS = 60
_SYNCS = {
    "full": "every weight",
    "lora_merged": "LoRA, merged: every adapted weight",
    "paca": "PaCA: the trained columns",
}
_SAMPLERS = {"paca": "PaCA", "lora": "LoRA, merged in bfloat16"}


def run(argv: list[str]) -> int:
    """Run `pacatune demo-rl` with the words after it; return the exit status."""
    options = _parse(argv)

    from rich.console import Console

    from pacatune.data.packaged import prepare_model
    from pacatune.experiments import demo_rl
    from pacatune.experiments.demo import faster_dtype
    from pacatune.reports.provenance import cpu_name, versions

    console = Console(highlight=False)
    folder = demo_rl.result_folder(Path(options.output))
    folder.start_anew()
    quiet_libraries()
    start = time.perf_counter()
    model = options.model or str(
        prepare_model(cache_of(options), lambda line: console.print(line, markup=False))
    )
    console.print(f"model: {model}", soft_wrap=True, markup=False)
    result = demo_rl.run_demo(
        model,
        folder,
        num_steps=options.steps,
        num_held_out=options.held_out,
        seed=options.seed,
        dtype=faster_dtype(),
        console=console,
    )
    console.rule("[bold]result", align="left")
    _print_result(result, console)
    minutes = (time.perf_counter() - start) / 60
    output = Path(options.output)
    positions = result.sync_bytes["paca_positions"] / 1e3
    notes = [
        f"The positions of PaCA's columns are sent once: {positions:.1f} kB.",
        f"LoRA was trained for {demo_rl.LORA_STEPS} steps, for the gap alone.",
        "The SFT and GRPO saw none of the held-out problems. One seed.",
        f"{minutes:.1f} minutes. The adapter of GRPO is in {output / 'paca'}, with its rewards "
        f"over the steps in reward.png, on the model in {output / 'start'}.",
    ]
    print_dim([*result.notes(), *notes], console)
    found = {"seed": options.seed, "num_steps": options.steps, "minutes": minutes, **asdict(result)}
    made_on = {"cpu": cpu_name(), "versions": versions("trl")}
    folder.write_json("demo-rl.json", {"finished": True, **made_on, **found})
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo-rl",
        "Teach SmolLM2-135M-Instruct to reverse lists of words: SFT on a few solved ones, then "
        "GRPO from rewards alone. Show held-out rewards, bytes per sync of a sampler, and how far "
        "its log-probabilities are from the trainer's.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", metavar="DIR", default="demo-rl-output", help=f"output folder {default}")
    add("--steps", type=positive, default=NUM_STEPS, help=f"steps of GRPO {default}")
    add("--held-out", type=positive, default=200, help=f"held-out problems {default}")
    add("--seed", type=int, default=0, help=f"seed of problems, columns, samples {default}")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    add("--cache", metavar="DIR", help="keeps the model (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def _print_result(result: "Result", console: "Console") -> None:
    from rich.text import Text

    for one in result.examples:
        question, *answers = one.items()
        console.print(Text(question[1].strip().splitlines()[-1], style="bold"))
        for stage, answer in answers:
            console.print(Text(f"  {stage:<11}{' '.join(answer.split())}"))
    kinds = list(next(iter(result.rewards.values())))
    _print_table(
        [f"\nmean reward on {result.num_held_out} held-out problems", *kinds],
        [[name, *(f"{one[kind]:.3f}" for kind in kinds)] for name, one in result.rewards.items()],
        console,
    )
    sizes = result.sync_bytes
    _print_table(
        ["\nsent to a bfloat16 sampler after each step", "MB", "share"],
        [
            [title, f"{sizes[name] / 1e6:.2f}", f"{100 * sizes[name] / sizes['full']:.1f}%"]
            for name, title in _SYNCS.items()
        ],
        console,
    )
    _print_table(
        ["\ntrainer and sampler in bfloat16", "mean |log p_train - log p_sample| per token"],
        [[_SAMPLERS[name], f"{gap:.1e}" if gap else "0"] for name, gap in result.gaps.items()],
        console,
    )


def _print_table(titles: list[str], rows: list[list[str]], console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    console.print(table)
