"""Run PaCA and its rivals in PEFT's comparison on MetaMathQA: needs a GPU of 32 GB.

    python -m benchmarks.metamath PEFT           # PEFT: a checkout of it, installed from there
    python -m benchmarks.metamath --dry-run      # two steps of each arm, of a tiny model on the CPU

Writes each run's configuration into a folder of its own beside PEFT's, runs PEFT's `run.py` on it
unless its result is there, and prints a table. A folder or result of others is never changed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pacatune  # noqa: F401  (makes PaCA known to PEFT)
from pacatune.reports.rows import Table

Options = dict[str, Any]
PLACE = Path("method_comparison", "MetaMathQA")
QV = ["q_proj", "v_proj"]


def _paca(rank: int, alpha: int, targets: Any, **groups: int) -> Options:
    kind = "PACATUNE" if groups else "PACA"
    sizes = {"peft_type": kind, "r": rank, "paca_alpha": alpha, **groups}
    return {**sizes, "target_modules": targets}


_LORA = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": QV}
_SHIRA = {"peft_type": "SHIRA", "r": 32, "target_modules": QV}
_THEIRS = (3e-4, 1e-3)
_OURS = (5e-4, 1.5e-3)
ARMS: dict[str, tuple[Options, tuple[float, ...]]] = {
    "lora-rank32": (_LORA, _THEIRS),
    "shira-rank32": (_SHIRA, _THEIRS),
    # PEFT's own two for PaCA.
    "paca-rank80": (_paca(80, 80, QV), (3e-4,)),
    "paca-rank32-all-linear": (_paca(32, 32, "all-linear"), (5e-4,)),
    # Those of the study at equal cost.
    "paca-rank16-all-linear": (_paca(16, 16, "all-linear"), _OURS),
    "paca-rank64-all-linear": (_paca(64, 16, "all-linear"), _OURS),
    "paca-rank16-pool64-all-linear": (_paca(16, 16, "all-linear", groups=64, pool=64), _OURS),
}
"""Adapter and learning rates of each arm."""
# Llama-3.2-3B but for its vocabulary.
_HEADS = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 64}
FULL = LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, **_HEADS)
_TINY_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
TINY = LlamaConfig(
    **(_HEADS | _TINY_HEADS), hidden_size=128, intermediate_size=256, num_hidden_layers=1
)


def runs(seeds: list[int]) -> Iterator[tuple[str, str, Options, Options]]:
    """Yield arm, name of the folder, adapter and training options of each run."""
    for seed in seeds:
        for arm, (adapter, rates) in ARMS.items():
            seeded = {} if adapter["peft_type"] == "LORA" else {"random_seed": seed}
            for rate in rates:
                training = {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.1}, "seed": seed}
                name = f"llama-3.2-3B-{arm}-lr{rate:g}-seed{seed}"
                yield arm, name, {"task_type": "CAUSAL_LM", **adapter, **seeded}, training


def write(folder: Path, adapter: Options, training: Options) -> None:
    """Write a run's folder; refuse one that holds something else."""
    for name, values in (("adapter_config.json", adapter), ("training_params.json", training)):
        path, text = folder / name, json.dumps(values, indent=2) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise FileExistsError(f"{path} holds another configuration; move it away.")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def results(place: Path, name: str) -> list[Options]:
    """Return what PEFT's script has written of a run."""
    found = [*place.glob(f"results/pacatune--{name}.json")]
    found += sorted(place.glob(f"temporary_results/pacatune--{name}--*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def compare(peft: Path, seeds: list[int]) -> None:
    """Do the runs that have no result, and print the table of all."""
    place = peft / PLACE
    if not (place / "run.py").is_file():
        raise FileNotFoundError(f"`PEFT` ({peft}) has no {PLACE / 'run.py'}; name its checkout.")
    found: dict[tuple[str, float], list[Options]] = {}
    script = "import runpy, pacatune; runpy.run_path('run.py', run_name='__main__')"
    for arm, name, adapter, training in runs(seeds):
        folder = Path("experiments", "pacatune", name)
        write(place / folder, adapter, training)
        if not results(place, name):
            subprocess.run([sys.executable, "-c", script, "-v", str(folder)], cwd=place, check=True)
        key = arm, training["optimizer_kwargs"]["lr"]
        found.setdefault(key, []).extend(results(place, name)[-1:])
    header = ["arm", "rate", "parameters", "n", "test accuracy, %", "training, s", "peak, GiB"]
    lines = [_line(*key, made) for key, made in found.items() if made]
    print("\n".join(Table(header=header, cells=lines, num_index=1).markdown()))


def _line(arm: str, rate: float, made: list[Options]) -> list[str]:
    infos = [one["train_info"] for one in made]
    scores = [100 * info["metrics"][-1]["test accuracy"] for info in infos]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    seconds = statistics.median(info["train_time"] for info in infos)
    peak = max(info["accelerator_memory_max"] for info in infos) / 2**30
    number = f"{infos[0]['num_trainable_params']:,}"
    score = f"{statistics.mean(scores):.1f}{spread}"
    return [arm, f"{rate:g}", number, str(len(made)), score, f"{seconds:.0f}", f"{peak:.1f}"]


def dry_run() -> None:
    """Read each arm as PEFT's script does, train a tiny model, and count the real one's."""
    torch.manual_seed(0)
    ids, lines = torch.randint(64, (2, 16)), []
    with tempfile.TemporaryDirectory() as scratch:
        for arm, name, adapter, training in runs([0]):
            write(Path(scratch, name), adapter, training)
            tiny = get_peft_model(
                LlamaForCausalLM(TINY), PeftConfig.from_pretrained(scratch + "/" + name)
            )
            trained = [p for p in tiny.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, **training["optimizer_kwargs"])
            losses = []
            for _ in range(3):
                loss = tiny(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            rate = training["optimizer_kwargs"]["lr"]
            lines.append([arm, f"{rate:g}", f"{count(adapter):,}", f"{losses[0] - losses[-1]:.4f}"])
    header = ["arm", "rate", "parameters of the 3B model", "fall of a tiny model's loss"]
    print("\n".join(Table(header=header, cells=lines, num_index=1).markdown()))


def count(adapter: Options, config: LlamaConfig = FULL) -> int:
    """Return how many parameters an arm trains, of Llama-3.2-3B."""
    with torch.device("meta"):
        modules = LlamaForCausalLM(config).named_modules()
    sizes = {name: module.weight.shape for name, module in modules if hasattr(module, "weight")}
    targets = adapter["target_modules"]
    chosen = [
        shape
        for name, shape in sizes.items()
        if name.endswith("_proj")
        and (targets == "all-linear" or name.rpartition(".")[2] in targets)
    ]
    per_rank = (sum(s) if adapter["peft_type"] in ("LORA", "SHIRA") else s[0] for s in chosen)
    return adapter["r"] * sum(per_rank)


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peft", type=Path, nargs="?", metavar="PEFT", help="a checkout of PEFT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on the CPU")
    options = parser.parse_args(argv)
    if options.dry_run:
        dry_run()
    elif options.peft is None:
        parser.error("name a checkout of PEFT, or give --dry-run")
    else:
        try:
            compare(options.peft.expanduser(), options.seeds)
        except OSError as error:
            sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
