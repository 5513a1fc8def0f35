"""How the examples of an optimizer step are split among processes and micro-batches.

A run may go on with another split of the same number of examples: each step sees the examples that
it would have seen, since Trainer deals consecutive batches of one seeded order to the processes.
"""

from dataclasses import dataclass
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length

# With other values, what a step sees depends on how it is split.
_USUAL = {
    "train_sampling_strategy": ("random", "sequential"),
    "dataloader_drop_last": (False,),
    "average_tokens_across_devices": (True,),
    "accelerator_config": (AcceleratorConfig(),),
}


@dataclass(frozen=True)
class Split:
    """Processes, examples of each in one pass, and passes before the optimizer's step."""

    num_processes: int
    batch_size: int
    accumulation: int

    @classmethod
    def of(cls, training: Any) -> "Split":
        """Return the split of a run."""
        return cls(
            training.world_size,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
        )

    @property
    def num_examples(self) -> int:
        """Examples per optimizer step."""
        return self.num_processes * self.batch_size * self.accumulation

    def __str__(self) -> str:
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        return f"{processes} x {self.batch_size} examples x {self.accumulation} accumulated"


def why_fixed(training: Any, examples: Any) -> str | None:
    """Return why a run must go on with the same split, None if it need not."""
    if not has_length(examples):
        return "a stream is dealt to the processes as it comes"
    if training.deepspeed_plugin is not None:
        return "DeepSpeed reads the states of as many processes as saved them"
    for option, usual in _USUAL.items():
        value = getattr(training, option)
        if value not in usual:
            return f"with `training.{option}` ({value}) the split decides what a step learns"
    return None
