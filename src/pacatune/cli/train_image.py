"""`pacatune train-image`: fine-tune an image classifier on your images."""

from typing import TYPE_CHECKING

from pacatune.cli.options import quiet_libraries
from pacatune.cli.run_options import RunOptions, check_early, values_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def run(argv: list[str]) -> int:
    """Run `pacatune train-image` with the words after it; return the exit status."""
    check_early(argv, "pacatune.training.image.config.ImageRunConfig", ("preset",))
    quiet_libraries()

    from pacatune.training.image import train

    run_options = _run_options()
    for name in values_of(argv, "preset"):
        from pacatune.training.image.config import find_preset

        run_options.parser.set_defaults(find_preset(name))
    options = run_options.parse(argv)
    if options.print_config:
        print(run_options.template(options), end="")
        return 0
    train(run_options.to_config(options), resume=options.resume, overwrite=options.overwrite)
    return 0


def build_parser() -> "ArgumentParser":
    """Return the parser: one option per field of ImageRunConfig and its sections, and the flags."""
    return _run_options().parser


def _run_options() -> RunOptions:
    from pacatune.training.image import ImageRunConfig
    from pacatune.training.image.config import PRESETS

    preset = {
        "metavar": "NAME",
        "help": "Start from a run of the paper's Tables 6 and 7 (model and data set; the other "
        f"settings are ours): {', '.join(PRESETS)}. Options override it.",
    }
    return RunOptions(ImageRunConfig, "Fine-tune an image classifier.", {"preset": preset})
