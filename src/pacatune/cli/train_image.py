"""`pacatune train-image`: fine-tune an image classifier on your images."""

from pacatune.cli.run_options import Request, RunOptions, values_of


def read(argv: list[str]) -> Request:
    """Return what the words ask for; refuse what can be seen to be wrong without torch."""
    from pacatune.training.image.config import find_preset

    preset = {}
    for name in values_of(argv, "preset"):
        preset = find_preset(name)
    request = all_options().parse(argv, preset)
    request.check()
    return request


def all_options() -> RunOptions:
    """Return the options of the command."""
    from pacatune.training.image.config import PRESETS

    text = (
        "Start from a run of the paper's Tables 6 and 7 (model and data set; the other settings "
        f"are ours): {', '.join(PRESETS)}. Options override it."
    )
    description = "Fine-tune an image classifier."
    return RunOptions("image", description, "preset", metavar="NAME", help=text)
