"""`pacatune train-image`: fine-tune an image classifier on your images."""

from pacatune.cli.options import quiet_libraries
from pacatune.cli.run_early import check_files, check_options
from pacatune.cli.run_options import RunOptions, carry_out, values_of

RUN_CLASS = "pacatune.training.image.config.ImageRunConfig"
FLAGS = {
    "preset": {
        "metavar": "NAME",
        "help": "Start from a run of the paper's Tables 6 and 7 (model and data set; the other "
        "settings are ours): {}. Options override it.",
    }
}
"""What only this command has beside the options of a run."""


def run(argv: list[str]) -> int:
    """Run `pacatune train-image` with the words after it; return the exit status."""
    if not {"-h", "--help"} & {*argv}:
        check_files(check_options(argv, "train-image", RUN_CLASS, FLAGS), "image")
    quiet_libraries()

    known = all_options()
    for name in values_of(argv, "preset"):
        from pacatune.training.image.config import find_preset

        known.parser.set_defaults(find_preset(name))
    options = known.parse(argv)
    if options.print_config:
        print(known.template(options), end="")
        return 0
    carry_out(known.to_config(options), options)
    return 0


def all_options() -> RunOptions:
    """Return the options of the command."""
    from pacatune.training.image import ImageRunConfig
    from pacatune.training.image.config import PRESETS

    preset = FLAGS["preset"] | {"help": FLAGS["preset"]["help"].format(", ".join(PRESETS))}
    return RunOptions(ImageRunConfig, "Fine-tune an image classifier.", {"preset": preset})
