"""`pacatune launch`: print the file that starts a run on several GPUs or nodes."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pacatune.cli.options import new_parser, positive, print_notes
from pacatune.installation import install_command

# What a format is told beside the run: option, its default, and the formats that read it.
_OPTIONS = {
    "image": (None, ("skypilot", "kubeflow")),
    "accelerator": ("H100", ("skypilot",)),
}
# Format -> its template in training/launch.
FORMATS = {
    "torchrun": "hosts",
    "accelerate-fsdp2": "hosts",
    "accelerate-zero3": "hosts",
    "slurm": "slurm",
    "skypilot": "skypilot",
    "kubeflow": "kubeflow",
}
_CPUS_PER_GPU = 4
# Kubernetes has the strictest names.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")


def run(argv: list[str]) -> int:
    """Run `pacatune launch` with the words after it; return the exit status."""
    options = _parse(argv)
    config = _read_run(options)
    text = render(options)
    if options.output is None:
        print(text, end="")
    else:
        _write_new(Path(options.output), text)
    print_notes(_notes(options, config))
    return 0


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; remove it, or name another file.") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "launch",
        "Print the file that starts a run on several GPUs or nodes. The run is checked first, as "
        "`pacatune train` would.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    formats = (
        "torchrun, accelerate-fsdp2 and accelerate-zero3: a script for each host; slurm: for "
        "sbatch; skypilot: a task; kubeflow: a TrainJob"
    )
    add("--print", dest="format", required=True, choices=FORMATS, help=formats)
    add("--config", metavar="PATH", required=True, help="the run, as of `pacatune train`")
    add("--nodes", type=positive, default=1, metavar="N", help=f"machines {default}")
    add("--gpus", type=positive, default=1, metavar="G", help=f"GPUs of each {default}")
    sharding = parser.add_mutually_exclusive_group()
    for name, by in (("fsdp2", "PyTorch's FSDP2"), ("zero3", "DeepSpeed's ZeRO-3")):
        what = f"shard the weights over all GPUs, by {by}"
        sharding.add_argument(
            f"--{name}", dest="sharding", action="store_const", const=name, help=what
        )
    restarts = (
        "start the processes again, up to N times, when one has died; the run goes on from its "
        f"last checkpoint {default}"
    )
    add("--max-restarts", type=positive, default=0, metavar="N", help=restarts)
    add("--name", help="name of the job (default: from the file's name)")
    add("--image", help="container image that has pacatune; without one, it is installed first")
    accelerator = f"SkyPilot's name of the GPU (default: {_OPTIONS['accelerator'][0]})"
    add("--accelerator", metavar="NAME", help=accelerator)
    add("--output", metavar="FILE", help="write a new file instead")
    words = "after `--`: further options of `pacatune train`"
    add("words", metavar="TRAIN_OPTION", nargs="*", default=[], help=words)
    options = parser.parse_args(argv)
    for name, (usual, formats_with_it) in _OPTIONS.items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
        elif options.format not in formats_with_it:
            raise ValueError(f"`--{name}` is for --print {' and '.join(formats_with_it)}.")
    if options.max_restarts:
        for word in {"--resume", "--overwrite"} & set(options.words):
            raise ValueError(
                f"`--max-restarts` ({options.max_restarts}) lets the run go on by itself, and each "
                f"restart would repeat {word}; drop one of them."
            )
        options.words.append("--auto_resume")
    if options.format.startswith("accelerate-"):
        options.sharding = _of_format(options)
    options.name = _name(options)
    return options


def _of_format(options: argparse.Namespace) -> str:
    """Return the sharding that a format names; another one beside it is refused."""
    named = options.format.removeprefix("accelerate-")
    if options.sharding not in (None, named):
        raise ValueError(f"`--{options.sharding}` contradicts --print {options.format}; drop one.")
    return str(named)


def _name(options: argparse.Namespace) -> str:
    if options.name is None:
        stem = re.sub(r"[^a-z0-9]+", "-", Path(options.config).stem.lower())
        return f"pacatune-{stem}"[:50].strip("-")
    if _NAME.fullmatch(options.name) is None:
        raise ValueError(
            f"`--name` ({options.name!r}) must be at most 50 small letters, digits and dashes, and "
            "begin with a letter."
        )
    return str(options.name)


def _read_run(options: argparse.Namespace) -> Any:
    """Return the run's configuration; refuse it as `pacatune train` would."""
    import torch

    from pacatune.cli.train import read_run

    words = ["--config", options.config, *options.words]
    if not torch.cuda.is_available():
        # The one option that is refused where no GPU is, as on a login node.
        words.append("--training.tf32=null")
    return read_run(words)


def render(options: argparse.Namespace) -> str:
    """Return the text of the launch file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pacatune.training", "launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    config_text = ""
    path = options.config
    if options.format == "kubeflow":
        # Its pods have no files of ours, so the file brings the run along.
        config_text, path = Path(path).read_text(encoding="utf-8").strip("\n"), "run.yaml"
    return environment.get_template(f"{FORMATS[options.format]}.j2").render(
        name=options.name,
        size=_size(options),
        nodes=options.nodes,
        gpus=options.gpus,
        cpus_per_gpu=_CPUS_PER_GPU,
        sharding=options.sharding,
        max_restarts=options.max_restarts,
        image=options.image,
        accelerator=f"{options.accelerator}:{options.gpus}",
        install=install_command("train") + (" deepspeed" if options.sharding == "zero3" else ""),
        config_text=config_text,
        words=shlex.join(["--config", path, *options.words]),
    )


def _size(options: argparse.Namespace) -> str:
    gpus = "1 GPU" if options.gpus == 1 else f"{options.gpus} GPUs"
    return f"one node, {gpus}" if options.nodes == 1 else f"{options.nodes} nodes, {gpus} each"


def _notes(options: argparse.Namespace, config: Any) -> Iterator[str]:
    from pacatune.training.config_file import local_paths
    from pacatune.training.split import Split

    split = Split.of(config.training, options.nodes * options.gpus)
    yield f"{split} = {split.num_examples} examples per optimizer step"
    if options.max_restarts and options.nodes > 1:
        yield f"for restarts, all nodes must share the disk of {config.training.output_dir}"
    if options.max_restarts and config.training.save_strategy == "no":
        yield "`training.save_strategy` is no: after a restart, the run begins anew"
    paths = local_paths(config)
    if paths and (options.nodes > 1 or options.format in ("skypilot", "kubeflow")):
        named = ", ".join(f"{name} ({value})" for name, value in paths.items())
        yield f"local paths, which every node needs: {named}"
