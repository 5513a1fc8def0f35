"""`pacatune train-image`: fine-tune an image classifier on your images."""

from jsonargparse import Namespace

from pacatune.cli.options import quiet_libraries
from pacatune.cli.run_options import RunOptions, carry_out, values_of


def run(argv: list[str]) -> int:
    """Run `pacatune train-image` with the words after it; return the exit status."""
    quiet_libraries()
    known, options = _parse(argv)
    carry_out(known.to_config(options), options)
    return 0


def check(argv: list[str]) -> None:
    """Refuse words that can be seen to be wrong without torch."""
    known, options = _parse(argv)
    known.check(options)


def _parse(argv: list[str]) -> tuple[RunOptions, Namespace]:
    from pacatune.training.image.config import find_preset

    known = all_options()
    for name in values_of(argv, "preset"):
        known.parser.set_defaults(find_preset(name))
    return known, known.parse(argv)


def all_options() -> RunOptions:
    """Return the options of the command."""
    from pacatune.training.image.config import PRESETS

    text = (
        "Start from a run of the paper's Tables 6 and 7 (model and data set; the other settings "
        f"are ours): {', '.join(PRESETS)}. Options override it."
    )
    description = "Fine-tune an image classifier."
    return RunOptions("image", description, "preset", metavar="NAME", help=text)
