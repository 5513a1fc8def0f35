"""LLaMA-Factory with PaCA: this module in the place of its command.

    python -m pacatune.integrations.llamafactory train config.yaml
    torchrun --nproc-per-node 8 -m pacatune.integrations.llamafactory train config.yaml

`finetuning_type: lora` trains PaCA, and `paca: {...}` has the options that LoRA has not. This is
LLaMA-Factory's version 0, which its own command runs too unless `USE_V1` is set.
"""

import os
import sys
from functools import partial
from typing import Any
from unittest.mock import patch

from pacatune.integrations.options import NO_DROPOUT, NOT_FOR_PACA, join_options, refuse_options
from pacatune.names import choose
from pacatune.tuner import PacaConfig

# LLaMA-Factory's options, and what they are in `PacaConfig`.
_NAMES = {
    "lora_rank": "r",
    "lora_alpha": "paca_alpha",
    "lora_target": "target_modules",
    "additional_target": "modules_to_save",
    "use_rslora": "use_rslora",
}
_LORA_ELSEWHERE = "it makes LoRA by code of its own"
# Options of LLaMA-Factory and of `LoraConfig`.
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "use_dora": NOT_FOR_PACA,
    "init_lora_weights": NOT_FOR_PACA,
    "pissa_init": NOT_FOR_PACA,
    "pissa_convert": NOT_FOR_PACA,
    "loraplus_lr_ratio": NOT_FOR_PACA,
    "use_unsloth": _LORA_ELSEWHERE,
    "use_kt": _LORA_ELSEWHERE,
    "use_mca": _LORA_ELSEWHERE,
    "use_hyper_parallel": _LORA_ELSEWHERE,
}


def lora_config(
    *, task_type: Any, inference_mode: bool, paca: dict[str, Any] | None = None, **options: Any
) -> PacaConfig:
    """Return PaCA's configuration, in the place of `LoraConfig`, and of what that is given.

    `paca` are options of `PacaConfig` that LLaMA-Factory has no argument for. An option of LoRA
    that PaCA would not keep is a ValueError.
    """
    refuse_options(options, _REFUSED, "LLaMA-Factory's PaCA")
    passed = {name: value for name, value in options.items() if name not in _REFUSED}
    passed["paca_alpha"] = passed.pop("lora_alpha", None)
    theirs = {name: passed.pop(ours, None) for name, ours in _NAMES.items()}
    joined = join_options(theirs, _NAMES, {} if paca is None else paca, "paca")
    return PacaConfig(task_type=task_type, inference_mode=inference_mode, **joined, **passed)


def main() -> None:
    """Run the command of LLaMA-Factory that is in `sys.argv`, with PaCA where it would make LoRA.

    Raises:
        ImportError: If LLaMA-Factory is missing, or is too old.
        ValueError: If the command does not exist, or would train LoRA.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    choose(command, ("train", "export"), option="command")
    try:
        from llamafactory.hparams import read_args
        from llamafactory.model import adapter
        from llamafactory.train import tuner
    except ModuleNotFoundError as error:
        raise ImportError(
            "pacatune.integrations.llamafactory needs LLaMA-Factory >= 0.9.5 and what it imports "
            f"({error}): pip install {(error.name or 'llamafactory').partition('.')[0]}"
        ) from error
    sys.argv.pop(1)
    arguments = read_args()
    paca = arguments.pop("paca", None) if isinstance(arguments, dict) else None
    if command == "export":
        if paca:
            raise ValueError("`paca` has options of training; `export` takes the adapter as it is.")
        tuner.export_model(arguments)
        return
    starters = ("USE_RAY",) if "LOCAL_RANK" in os.environ else ("USE_RAY", "FORCE_TORCHRUN")
    for name in starters:
        if os.environ.get(name, "").lower() not in ("true", "y", "1"):
            continue
        raise ValueError(
            f"{name} is set: LLaMA-Factory would start processes in which PaCA is unknown. Start "
            "them by `torchrun --nproc-per-node N -m pacatune.integrations.llamafactory train "
            "CONFIG`."
        )
    plain = tuner.get_train_args

    def parse_and_check(args: Any = None) -> Any:
        parsed = plain(args)
        _check(*parsed, paca=paca)
        return parsed

    with (
        patch.object(adapter, "LoraConfig", partial(lora_config, paca=paca)),
        patch.object(tuner, "get_train_args", parse_and_check),
    ):
        tuner.run_exp(arguments)


def _check(
    model: Any, data: Any, training: Any, finetuning: Any, *_: Any, paca: dict[str, Any] | None
) -> None:
    """Refuse what would train something else, before anything is loaded."""
    if finetuning.finetuning_type != "lora":
        raise ValueError(
            f"`finetuning_type` is {finetuning.finetuning_type!r}; PaCA takes the place of `lora`: "
            "set that, or run `llamafactory-cli`."
        )
    refuse_options(vars(model) | vars(finetuning), _REFUSED, "PaCA")
    if model.adapter_name_or_path and paca and not finetuning.create_new_adapter:
        raise ValueError(
            f"`paca` ({paca}) has options of a new adapter, and `adapter_name_or_path` "
            f"({model.adapter_name_or_path}) goes on with one, whose own count: drop `paca`."
        )
    # Targets are not known before the model is.
    theirs = {name: getattr(finetuning, name) for name in ("lora_rank", "lora_alpha", "use_rslora")}
    join_options(theirs, _NAMES, {} if paca is None else paca, "paca")


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(str(error))
    except ValueError as error:
        sys.exit(f"pacatune.integrations.llamafactory: {error}")
