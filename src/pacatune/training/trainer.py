"""TRL's SFTTrainer with whole checkpoints and with what is measured."""

from typing import Any

from torch import Tensor, nn
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune.training.checkpoints import WholeCheckpoints
from pacatune.training.progress import Meter


class RunTrainer(WholeCheckpoints, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that writes each checkpoint aside and renames it when it is complete.

    Args:
        meter: Counts tokens here; its callback counts time.
        kwargs: As for SFTTrainer.
    """

    def __init__(self, *, meter: Meter, **kwargs: Any) -> None:
        super().__init__(meter=meter, **kwargs)
        if getattr(self.model, "is_quantized", False):
            # TRL holds adapters on quantised models in bfloat16, which loses small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take one micro-batch forward and backward, counting its tokens."""
        self._meter.add(num_tokens(inputs))
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss


def collate_rows(data: Any, tokenizer: Any, places: list[int]) -> dict[str, Tensor]:
    """Return the rows at some places as one padded batch, as the trainer makes it.

    Args:
        data: Rows of `input_ids` and `labels`.
        tokenizer: Its padding, or where it has none the end of a text, fills rows up.
        places: Of the rows.
    """
    padding = tokenizer.pad_token_id
    collator = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.eos_token_id if padding is None else padding
    )
    rows = [data[place] for place in places]
    return dict(collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows]))


def num_tokens(inputs: dict[str, Any]) -> int | Tensor:
    """Return how many tokens of a micro-batch are not padding."""
    mask: Tensor | None = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel()) if mask is None else mask.sum()
