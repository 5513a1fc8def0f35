"""`pacatune demo-rl`: teach a real model arithmetic by rewards, and show what sampling costs."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.demo import cache_of, print_dim
from pacatune.cli.options import new_parser, positive, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.experiments.demo_rl import Gap, Rewards

NUM_STEPS = 40
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

    console = Console(highlight=False)
    folder = demo_rl.result_folder(Path(options.output))
    folder.open()
    quiet_libraries()
    start = time.perf_counter()
    model = options.model or str(
        prepare_model(cache_of(options), lambda line: console.print(line, markup=False))
    )
    console.print(f"model: {model}", soft_wrap=True, markup=False)
    result = demo_rl.run_demo(
        model,
        Path(options.output),
        num_steps=options.steps,
        num_held_out=options.held_out,
        seed=options.seed,
        dtype=faster_dtype(),
        console=console,
    )
    console.rule("[bold]result", align="left")
    _print_rewards(result.rewards, options.held_out, console)
    _print_syncs(result.sync_bytes, console)
    _print_gaps(result.gaps, console)
    minutes = (time.perf_counter() - start) / 60
    notes = [
        "Prompts of the SFT and of GRPO are not among the held-out problems. One seed.",
        f"{minutes:.1f} minutes. The adapter of GRPO is in {Path(options.output) / 'paca'}, on "
        f"the model in {Path(options.output) / 'start'}.",
    ]
    print_dim([*result.notes(), *notes], console)
    folder.write({"finished": True, "seed": options.seed, "minutes": minutes, **asdict(result)})
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo-rl",
        "Teach SmolLM2-135M-Instruct sums: SFT on 200 solved ones, then GRPO from rewards alone. "
        "Show held-out rewards, bytes per sync of a sampler, and how far its log-probabilities "
        "are from the trainer's.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", metavar="DIR", default="demo-rl-output", help=f"output folder {default}")
    add("--steps", type=positive, default=NUM_STEPS, help=f"steps of GRPO {default}")
    add("--held-out", type=positive, default=200, help=f"held-out problems {default}")
    add("--seed", type=int, default=0, help=f"seed of problems, columns, samples {default}")
    add("--model", metavar="BASE", help="another model: a folder or hub id")
    add("--cache", metavar="DIR", help="keeps the model (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def _print_rewards(rewards: "dict[str, Rewards]", number: int, console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(f"mean reward on {number} held-out problems")
    for name in ("greedy", "sampled"):
        table.add_column(name, justify="right")
    for name, one in rewards.items():
        table.add_row(name, f"{one.greedy:.3f}", f"{one.sampled:.3f}")
    console.print(table)


def _print_syncs(sizes: dict[str, int], console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("\nsent to a bfloat16 sampler after each step")
    table.add_column("MB", justify="right")
    table.add_column("share", justify="right")
    for name, title in _SYNCS.items():
        share = f"{100 * sizes[name] / sizes['full']:.1f}%"
        table.add_row(title, f"{sizes[name] / 1e6:.2f}", share)
    console.print(table)


def _print_gaps(gaps: "dict[str, Gap]", console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("\nmean |log p_train - log p_sample| per token, bfloat16")
    for title in ("weights bit-equal", "one pass each", "as generated"):
        table.add_column(title, justify="right")
    for name, gap in gaps.items():
        equal = "yes" if gap.weights_equal else "no"
        table.add_row(_SAMPLERS[name], equal, f"{gap.by_weights:.2e}", f"{gap.as_sampled:.2e}")
    console.print(table)
