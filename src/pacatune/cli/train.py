"""`pacatune train`: fine-tune a model on your data."""

from pacatune.cli.run_options import RunOptions, check_early


def run(argv: list[str]) -> int:
    """Run `pacatune train` with the words after it; return the exit status."""
    check_early(argv, "pacatune.training.config.RunConfig", ("preview",))

    from pacatune.training import preview, train

    known = all_options()
    options = known.parse(argv)
    if options.print_config:
        print(known.template(options), end="")
        return 0
    config = known.to_config(options)
    if options.preview is not None and options.preview < 1:
        raise ValueError(f"`--preview` ({options.preview}) must be at least 1.")
    if options.preview is not None:
        preview(config, options.preview)
        return 0
    train(config, resume=options.resume, overwrite=options.overwrite)
    return 0


def all_options() -> RunOptions:
    """Return the options of the command."""
    from pacatune.training import RunConfig

    preview = {
        "type": int | None,
        "metavar": "N",
        "help": "Show N examples with the tokens that are learned, and stop.",
    }
    return RunOptions(RunConfig, "Fine-tune a causal language model.", {"preview": preview})
