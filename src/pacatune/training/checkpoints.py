"""What every trainer of a run does its own way: checkpoints that are whole or absent, above all."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from pacatune.lean import LeanReport
from pacatune.measure.counters import SavedBytes
from pacatune.pretrained import load_weights, readable_weights
from pacatune.training.finite import FiniteSteps
from pacatune.training.output import STATE_NAME, publish, refuse_empty_tensors, staged
from pacatune.training.progress import Meter


class RunTrainer(FiniteSteps):
    """Put before a Trainer class: writes each checkpoint aside and renames it when it is complete.

    It also stops at what is not finite, as `FiniteSteps` says, and counts the bytes that the first
    step keeps for backward.

    Args:
        meter: Counts what the steps process; its callback counts time.
        kwargs: As for the Trainer.
    """

    def __init__(self, *, meter: Meter, **kwargs: Any) -> None:
        self._meter = meter
        self._staging: Path | None = None
        self.saved_activation_bytes: int | None = None
        self.lean_report: LeanReport | None = None
        super().__init__(**kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; the first time in training, count what is kept for backward."""
        first = self.saved_activation_bytes is None and torch.is_grad_enabled()
        if not first or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            # Gathered weights lie in storages of their own and would count as activations.
            return super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        with SavedBytes(model) as saved:
            result = super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        self.saved_activation_bytes = saved.num_bytes
        return result

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run writes its own card when it knows the results."""

    def _send_telemetry(self) -> None:
        """Do nothing: a run tells nobody about itself."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable_weights(resume_from_checkpoint):
            if not self._load_plain_model(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if not self._load_plain_model(self.state.best_model_checkpoint):  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]

    def _load_plain_model(self, checkpoint: str) -> bool:
        """Load every weight of a model without adapter; return False if it is another kind.

        transformers saves some models under the names of older releases and translates them in
        `from_pretrained` only: Trainer would find none of those and keep what it has, silently.
        """
        trainer: Any = self
        model = trainer.model
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded or not isinstance(model, PreTrainedModel):
            return False
        saved = load_weights(type(model), checkpoint, dtype=model.dtype, config=model.config)
        model.load_state_dict(saved.state_dict())
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer: Any = self
        self.refuse_not_finite()
        folder = Path(trainer.args.output_dir)
        name = f"checkpoint-{trainer.state.global_step}"
        with staged(folder, name, owner=trainer.args.should_save) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                trainer.accelerator.wait_for_everyone()
                if trainer.args.should_save:
                    refuse_empty_tensors(staging / name)
                    _name_best_checkpoint(trainer.state, folder, staging / name)
                    publish(staging / name, folder / name)
            finally:
                self._staging = None
            trainer.accelerator.wait_for_everyone()
        trainer.accelerator.wait_for_everyone()  # or one could stage the next before this is gone
        self.rotate_when_good()


def _name_best_checkpoint(state: Any, folder: Path, checkpoint: Path) -> None:
    """Let the state name the best checkpoint where it will be, not where it is staged."""
    best = state.best_global_step
    if not best:
        return
    target = folder / f"checkpoint-{best}"
    if target.name == checkpoint.name or target.is_dir():
        state.best_model_checkpoint = str(target)
        state.save_to_json(str(checkpoint / STATE_NAME))


class LogBeforeSave(TrainerCallback):  # type: ignore[misc]
    """Logs at every checkpoint and at the last step.

    The loss since the last log is not part of a checkpoint, so a resumed run would lose it.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log where a checkpoint or the end follows."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the end of a step."""
        if control.should_save:
            control.should_log = True


class TrainedOn(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps in each checkpoint what it takes to continue it step by step.

    Args:
        fingerprint: Digest of the training data.
        num_processes: Among which it was shared out.
    """

    def __init__(self, fingerprint: str, num_processes: int) -> None:
        self.fingerprint = fingerprint
        self.num_processes = num_processes

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes into trainer_state.json."""
        return {
            "args": {"fingerprint": self.fingerprint, "num_processes": self.num_processes},
            "attributes": {},
        }
