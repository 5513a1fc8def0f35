"""ms-swift: `--external_plugins paca_plugin.py --tuner_type paca`, where the file registers PaCA.

    from pacatune.integrations.ms_swift import register

    register(random_seed=1)

docs/integrations.md says what of ms-swift's options is kept.
"""

from dataclasses import fields
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from pacatune.integrations.options import NO_DROPOUT, NOT_FOR_PACA, join_options, refuse_options
from pacatune.tuner import PacaConfig

try:
    from swift.arguments.tuner_args import TunerArguments
    from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
    from swift.tuner_plugin import PeftTuner, tuners_map
except ModuleNotFoundError as error:
    raise ImportError(
        f"pacatune.integrations.ms_swift needs ms-swift >= 4.6 ({error}): pip install ms-swift"
    ) from error

TUNER = "paca"
"""Value of ms-swift's `--tuner_type`."""

# ms-swift's names of options that PaCA has too; its defaults count.
_NAMES = {
    "lora_rank": "r",
    "lora_alpha": "paca_alpha",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "target_parameters": "target_parameters",
}
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "lora_dtype": "PaCA trains in float32",
    "lorap_lr_ratio": NOT_FOR_PACA,
    "use_dora": NOT_FOR_PACA,
    "init_weights": NOT_FOR_PACA,
}


def register(**options: Any) -> None:
    """Make `--tuner_type paca` known to ms-swift.

    Args:
        **options: Options of `PacaConfig` that ms-swift has no argument for.

    Raises:
        ValueError: If one does not exist, or has a value that is refused.
    """
    join_options({}, {}, options, "register")
    PacaTuner.options = options
    tuners_map[TUNER] = PacaTuner


class PacaTuner(PeftTuner):
    """Adapts, saves and loads models for ms-swift."""

    options: ClassVar[dict[str, Any]] = {}
    """What `register` was given."""

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> PeftModel:
        """Adapt a model as ms-swift's arguments say."""
        return get_peft_model(model, cls._config(args, model))

    @classmethod
    def _config(cls, args: Any, model: nn.Module) -> PacaConfig:
        theirs = {f.name: getattr(args, f.name) for f in fields(TunerArguments)}
        unchanged = {f.name: f.default for f in fields(TunerArguments)} | {"init_weights": True}
        changed = {name: value for name, value in theirs.items() if value != unchanged[name]}
        refuse_options(changed, _REFUSED, f"--tuner_type {TUNER}")
        task = args.task_type.upper()
        theirs["target_modules"] = get_target_modules(args, model)
        theirs["modules_to_save"] = get_modules_to_save(args, model, task)
        names = {**_NAMES, "target_modules": "target_modules", "modules_to_save": "modules_to_save"}
        options = join_options(theirs, names, cls.options, "register")
        return PacaConfig(task_type=task if task in TaskType.__members__ else None, **options)

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> PeftModel:
        """Load an adapter onto the base that it was trained on."""
        quantization = getattr(PeftConfig.from_pretrained(model_id), "base_quantization", None)
        if quantization and not getattr(model, "is_quantized", False):
            raise ValueError(
                f"{model_id} was trained on a quantised base, and ms-swift gives one that is not; "
                "to merge it, use `pacatune merge`."
            )
        return PeftModel.from_pretrained(model, model_id, **kwargs)
