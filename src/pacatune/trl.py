"""TRL's own scripts with PaCA: `python -m pacatune.trl sft` takes what `trl sft` takes.

    python -m pacatune.trl sft --model_name_or_path my-model --dataset_name my-data --lora_r 16
    accelerate launch -m pacatune.trl dpo --config dpo.yaml

`--paca '{"random_seed": 1}'`, or `paca: {random_seed: 1}` in the YAML file, has the options of
`PacaConfig` that TRL has no argument for.
"""

import importlib
import json
import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from pacatune.installation import require_extra
from pacatune.integrations.options import (
    NO_DROPOUT,
    NOT_FOR_PACA,
    join_options,
    refuse_options,
)
from pacatune.names import choose

if TYPE_CHECKING:
    from pacatune import PacaConfig

SCRIPTS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
"""Names of TRL's scripts that make an adapter."""

# TRL's names of options that PaCA has too; its defaults count.
_NAMES = {
    "lora_r": "r",
    "lora_alpha": "paca_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
}
_IN_BFLOAT16 = (
    "TRL holds adapters on quantised models in bfloat16, which loses small updates; `pacatune "
    "train --method qpaca` does not"
)
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "use_dora": NOT_FOR_PACA,
    "load_in_4bit": _IN_BFLOAT16,
    "load_in_8bit": _IN_BFLOAT16,
}


def main(words: list[str] | None = None) -> None:
    """Run a script of TRL, `words[0]`, with the rest as its arguments.

    Raises:
        ValueError: If there is no such script, TRL is missing, or an option is refused.
    """
    words = sys.argv[1:] if words is None else words
    name = choose(words[0] if words else "", SCRIPTS, option="script")
    require_extra("python -m pacatune.trl", "train", ("trl", "datasets", "yaml"))
    script = importlib.import_module(f"trl.scripts.{name}")
    # TRL's scripts make PaCA's configuration in this block.
    with patch.multiple("trl", ModelConfig=_model_config(), get_peft_config=_peft_config):
        parser = script.make_parser(prog=f"python -m pacatune.trl {name}")
        script.main(*parser.parse_args_and_config(words[1:]))


def _model_config() -> type[Any]:
    """Return TRL's arguments of a model, with PaCA's."""
    from trl import ModelConfig

    @dataclass
    class PacaModelConfig(ModelConfig):
        use_peft: bool = field(default=True, metadata={"help": "Always true here."})
        paca: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "Further options of PacaConfig, as JSON."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if isinstance(self.paca, str):
                self.paca = json.loads(self.paca)

    return PacaModelConfig


def _peft_config(arguments: Any) -> "PacaConfig":
    """Return PaCA's configuration, in the place of TRL's `get_peft_config`."""
    from pacatune import PacaConfig

    if not arguments.use_peft:
        raise ValueError("`use_peft` is false; to train every weight, use `trl` itself.")
    theirs = {f.name: getattr(arguments, f.name) for f in fields(arguments)}
    unchanged = {f.name: f.default for f in fields(arguments)}
    changed = {name: value for name, value in theirs.items() if value != unchanged[name]}
    refuse_options(changed, _REFUSED, "python -m pacatune.trl")
    options = join_options(theirs, _NAMES, arguments.paca or {}, "paca")
    return PacaConfig(task_type=arguments.lora_task_type, **options)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"pacatune.trl: {error}")
