"""A run stops at the first loss, gradient or weight that is not finite."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from pacatune.training.output import last_checkpoint


class TrainingDiverged(ValueError):
    """A loss, a gradient norm or a trained weight is not finite."""


class FiniteSteps:
    """Put before a Trainer class: stops a run before its weights are spoilt, or saved so.

    Loss and gradient norm are looked at once per step, before the optimizer uses them, instead of
    Trainer's own look at the loss of each micro-batch. A checkpoint is good once its weights have
    given a finite loss: in evaluation, or in the step after it. Only then are older ones deleted.

    Args:
        kwargs: As for the Trainer.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._step_loss: Tensor | float = 0.0
        # The newest step after which the weights gave a finite loss; None: not known of this run.
        self._good_step: int | None = None
        self._has_spare_checkpoints = False
        self._last_rate: float | None = None
        super().__init__(**kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one micro-batch forward and backward, adding up the loss of the step."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; Trainer asks for it between backward and optimizer.

        Raises:
            TrainingDiverged: If the norm or the loss of this step is not finite.
        """
        trainer: Any = self
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        loss, self._step_loss = self._step_loss, 0.0
        values = [torch.as_tensor(0.0 if v is None else v).detach() for v in (loss, norm)]
        values = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]
        # Together, so that a device is waited for once.
        found = torch.stack([v.to(trainer.args.device, torch.float32) for v in values]).tolist()
        step = trainer.state.global_step + 1
        if not math.isfinite(found[0]):
            raise self._diverged(f"the loss of step {step} is {found[0]}")
        self._trust_weights()
        if not math.isfinite(found[1]) and not self._scaler_may_mend_it():
            raise self._diverged(f"the gradient norm of step {step} is {found[1]}")
        self._last_rate = trainer._get_learning_rate()
        return norm

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate or predict.

        Raises:
            TrainingDiverged: If the loss is not finite.
        """
        result = super().evaluation_loop(  # type: ignore[misc]
            *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        loss = result.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None and not math.isfinite(loss):
            step = self.state.global_step  # type: ignore[attr-defined]
            raise self._diverged(f"the evaluation loss after step {step} is {loss}")
        if loss is not None:
            self._trust_weights()
        return result

    def refuse_not_finite(self) -> None:
        """Refuse to save weights that are not finite; every process must call it.

        Raises:
            TrainingDiverged: Names one.
        """
        trainer: Any = self
        # ZeRO-3 and FSDP2 hold shards; PyTorch's own name for one is to_local.
        trained = {
            name: getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p)
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }
        flags = [p.detach().isfinite().all().to(trainer.args.device) for p in trained.values()]
        bad = ~torch.stack(flags)
        if not trainer.accelerator.reduce(bad.sum(), "sum"):
            return
        here = [repr(name) for name, is_bad in zip(trained, bad.tolist(), strict=True) if is_bad]
        weight = here[0] if here else "of another process"
        raise self._diverged(
            f"weight {weight} is not finite after step {trainer.state.global_step}"
        )

    def rotate_checkpoints(self) -> None:
        """Delete all but the newest `save_total_limit` checkpoints and the best one."""
        trainer: Any = self
        self._has_spare_checkpoints = False
        if trainer.args.should_save:
            rotate_checkpoints(
                output_dir=trainer.args.output_dir,
                save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
            )

    def rotate_when_good(self) -> None:
        """Rotate the checkpoints now if the newest is known to be good, else when it is."""
        self._has_spare_checkpoints = True
        if self._good_step == self.state.global_step:  # type: ignore[attr-defined]
            self.rotate_checkpoints()

    def _trust_weights(self) -> None:
        """The weights as they are have given a finite loss."""
        self._good_step = self.state.global_step  # type: ignore[attr-defined]
        if self._has_spare_checkpoints:
            self.rotate_checkpoints()

    def _scaler_may_mend_it(self) -> bool:
        """Whether float16's gradient scaler skips this step and tries a smaller scale."""
        scaler = getattr(self.accelerator, "scaler", None)  # type: ignore[attr-defined]
        return scaler is not None and scaler.get_scale() >= 1

    def _diverged(self, what: str) -> TrainingDiverged:
        trainer: Any = self
        step, args = trainer.state.global_step, trainer.args
        if step == 0:
            return TrainingDiverged(
                f"{what} before any weight was changed; so it is the model or the data that give "
                "it: try `model.dtype: float32`, and look at the data."
            )
        # Of a resumed run, the weights that it began with have given nothing finite yet.
        good = step - 1 if self._good_step is None else self._good_step
        checkpoint = last_checkpoint(Path(args.output_dir), up_to=good)
        rate = trainer._get_learning_rate() if self._last_rate is None else self._last_rate
        kept = f"{checkpoint} is the last good checkpoint."
        return TrainingDiverged(
            f"training diverged: {what}; the learning rate before was {rate:.3g}: lower "
            f"`training.learning_rate` ({args.learning_rate:g}) or raise "
            "`training.warmup_steps`. " + (kept if checkpoint else "No good checkpoint was saved.")
        )
