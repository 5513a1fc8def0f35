"""The trainer of a run: it stops in time, and every checkpoint is whole and good, or absent."""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from pacatune.adapters.folder import HEAD_KEY, SIDECAR_NAME
from pacatune.files.folder import explained_failure
from pacatune.files.owned_folder import to_json
from pacatune.lean import LeanReport
from pacatune.measure.counters import SavedBytes
from pacatune.pretrained import load_weights, readable_weights
from pacatune.training.output import (
    STATE_NAME,
    TrainedOn,
    last_checkpoint,
    refuse_missing_weights,
    run_folder,
    trained_on,
    what_is_intact,
)
from pacatune.training.progress import Meter
from pacatune.training.task import TaskData, find_heads

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingDiverged(ValueError):
    """A loss, a gradient norm or a trained weight is not finite."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after its checkpoint was saved."""


class RunTrainer(Trainer):
    """Put before a trainer of TRL or transformers: no weight is spoilt, no checkpoint incomplete.

    Loss and gradient norm are looked at once per step, before the optimizer uses them, instead of
    Trainer's own look at the loss of each micro-batch. A checkpoint is good once its weights have
    given a finite loss: in evaluation, or in the step after it. Only then are older ones deleted.

    It also counts what the steps process and the bytes that the first one keeps for backward.
    """

    trained_on: TrainedOn
    """What each checkpoint says of itself; how it was launched is added."""
    lean_report: LeanReport | None = None
    prepare: Callable[[Any], TaskData]
    """Reads and encodes the data of a task, and says what that asks of the model."""
    has_new_head = False
    """Whether the model's head learns at `head_learning_rate`, and not as the rest."""

    def __init__(self, **kwargs: Any) -> None:
        self.meter = Meter()
        self._staging: Path | None = None
        # The newest step after which the weights gave a finite loss; None: not known of this run.
        self._good_step: int | None = None
        self._has_spare_checkpoints = False
        self.saved_activation_bytes: int | None = None
        super().__init__(**kwargs)
        self.add_callback(self.meter)
        if getattr(self.model, "is_quantized", False):
            # TRL holds adapters on quantised models in bfloat16, which loses small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.is_fsdp_enabled:
            self._gather_trained_head()

    def _gather_trained_head(self) -> None:
        """Gather a trained head by FSDP2 itself before each pass.

        accelerate makes it a group of its own under PEFT, and TRL multiplies by its weight without
        calling it. So TRL would find a shard and gather it by a call that does not add up the
        gradients of the processes.
        """
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        head = base.get_output_embeddings()
        if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
            return

        def gather(*_: Any) -> None:
            if isinstance(head, FSDPModule):
                head.unshard()

        base.base_model.register_forward_pre_hook(gather)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer, in which a new head has a learning rate of its own."""
        optimizer = super().create_optimizer(model)
        if self.has_new_head and self.args.head_learning_rate is not None:
            give_head_rate(optimizer, self.model, self.args.head_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, except for a warm-up that is one step of a short run.

        Its rate would be 0. Where the warm-up is a share of all steps, it is half the peak.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        is_one = self.args.warmup_steps < 1 == self.args.get_warmup_steps(num_training_steps)
        rates = getattr(scheduler, "lr_lambdas", [])
        if is_one and rates and all(rate(0) == 0 for rate in rates):
            scheduler._last_lr = [peak / 2 for peak in scheduler.base_lrs]
            groups = scheduler.optimizer.param_groups
            for group, rate in zip(groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
        return scheduler

    def num_items(self, inputs: dict[str, Any]) -> int | Tensor:
        """Return how many tokens of a micro-batch are not padding."""
        if "attention_mask" in inputs:
            mask: Tensor = inputs["attention_mask"]
            return mask.sum()
        if "input_ids" in inputs:  # packed
            return int(inputs["input_ids"].numel())
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
        return torch.stack([mask.sum() for mask in masks]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss; count the micro-batch, and what the first one keeps for backward."""
        if torch.is_grad_enabled():
            self.meter.add(self.num_items(inputs))
        first = self.saved_activation_bytes is None and torch.is_grad_enabled()
        if not first or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Gathered weights lie in storages of their own and would count as activations.
            return super().compute_loss(model, inputs, *args, **kwargs)
        with SavedBytes(model) as saved:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        self.saved_activation_bytes = saved.num_bytes
        return result

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; Trainer asks for it between backward and optimizer."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed knows no norm before its first step.
        size = 0.0 if norm is None else norm
        values = [torch.as_tensor(value).detach() for value in (self._tr_loss, size)]
        values = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]
        # Together, so that a device is waited for once.
        loss, size = torch.stack([v.to(self.args.device, torch.float32) for v in values]).tolist()
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            raise self._diverged(f"the loss of step {step} is {loss}")
        self._trust_weights()
        scaler = getattr(self.accelerator, "scaler", None)
        # float16's scaler skips such a step and tries a smaller scale.
        if not math.isfinite(size) and not (scaler is not None and scaler.get_scale() >= 1):
            raise self._diverged(f"the gradient norm of step {step} is {size}")
        return norm

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log; the loss of an evaluation must be finite."""
        loss = logs.get("eval_loss")
        if loss is not None and not math.isfinite(loss):
            step = self.state.global_step
            raise self._diverged(f"the evaluation loss after step {step} is {loss}")
        if loss is not None:
            self._trust_weights()
        super().log(logs, *args, **kwargs)

    def refuse_not_finite(self) -> None:
        """Refuse to save weights that are not finite; every process must call it."""
        # ZeRO-3 and FSDP2 hold shards; PyTorch's own name for one is to_local.
        trained = {
            name: getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        flags = [p.detach().isfinite().all().to(self.args.device) for p in trained.values()]
        bad = ~torch.stack(flags)
        if not self.accelerator.reduce(bad.sum(), "sum"):
            return
        here = [repr(name) for name, is_bad in zip(trained, bad.tolist(), strict=True) if is_bad]
        weight = here[0] if here else "of another process"
        raise self._diverged(f"weight {weight} is not finite after step {self.state.global_step}")

    def _diverged(self, what: str) -> TrainingDiverged:
        step, args = self.state.global_step, self.args
        if step == 0:
            return TrainingDiverged(
                f"{what} before any weight was changed; so it is the model or the data that give "
                "it: try `model.dtype: float32`, and look at the data."
            )
        # Of a resumed run, the weights that it began with have given nothing finite yet.
        good = step - 1 if self._good_step is None else self._good_step
        kept = last_checkpoint(Path(args.output_dir), up_to=good) or "None"
        return TrainingDiverged(
            f"training diverged: {what}; the learning rate is {self._get_learning_rate():.3g}: "
            f"lower `training.learning_rate` ({args.learning_rate:g}) or raise "
            f"`training.warmup_steps`. {kept} is the last good checkpoint."
        )

    def _trust_weights(self) -> None:
        """Note that the weights as they are have given a finite loss."""
        self._good_step = self.state.global_step
        if self._has_spare_checkpoints:
            self.rotate_checkpoints()

    def rotate_checkpoints(self) -> None:
        """Delete all but the newest `save_total_limit` checkpoints and the best one."""
        self._has_spare_checkpoints = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log before each checkpoint and the end: a resumed run would lose the loss since."""
        self.control.should_log |= self.control.should_save or self.control.should_training_stop
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no further where the checkpoint that is resumed was the last of the run."""
        stopped = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run writes its own card when it knows the results."""

    def _send_telemetry(self) -> None:
        """Do nothing: a run tells nobody about itself."""

    @property
    def _launched_by(self) -> str:
        """Return what decides the form of a checkpoint's states."""
        if self.is_fsdp_enabled:
            kind: str = self.accelerator.state.fsdp_plugin.state_dict_type.name
            return f"FSDP2 with fsdp_state_dict_type {kind}"
        return "DeepSpeed" if self.is_deepspeed_enabled else "a run without FSDP2 or DeepSpeed"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        before = trained_on(Path(resume_from_checkpoint)).launched_by
        if before != self._launched_by:
            raise ValueError(
                f"{resume_from_checkpoint} was saved by {before} and cannot be continued by "
                f"{self._launched_by}. Launch the run as before, or start again with --overwrite."
            )
        with readable_weights(resume_from_checkpoint):
            if not self._load_plain_model(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_plain_model(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_plain_model(self, checkpoint: str) -> bool:
        """Load every weight of a model without adapter; return False if it is another kind.

        transformers saves some models under the names of older releases and translates them in
        `from_pretrained` only: Trainer would find none of those and keep what it has, silently.
        """
        model = self.model
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded or not isinstance(model, PreTrainedModel):
            return False
        saved = load_weights(type(model), checkpoint, dtype=model.dtype, config=model.config)
        model.load_state_dict(saved.state_dict())
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole adapter or model; beside an adapter with a new head, what its classes are.

        Every process must call it. Under FSDP2, Trainer saves none beside sharded checkpoints, and
        for the others it gathers the frozen base, too.
        """
        with warnings.catch_warnings():
            # PEFT looks for a config.json beside a base, which a GGUF has within.
            warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf ")
            if self.accelerator.is_fsdp2:
                options = StateDictOptions(
                    full_state_dict=True,
                    cpu_offload=True,
                    ignore_frozen_params=isinstance(self.model, PeftModel),
                )
                state_dict = get_model_state_dict(self.model, options=options)
                self._save(output_dir, state_dict=state_dict)
            else:
                super().save_model(output_dir, _internal_call)
        model = self.accelerator.unwrap_model(self.model)
        adapter = getattr(model, "peft_config", {}).get("default")
        if self.args.should_save and getattr(adapter, "task_type", None) == "SEQ_CLS":
            names = ("id2label", "label2id", "pad_token_id", "problem_type")
            head = {HEAD_KEY: {name: getattr(model.config, name) for name in names}}
            (Path(output_dir or self.args.output_dir) / SIDECAR_NAME).write_text(
                to_json(head), encoding="utf-8"
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.refuse_not_finite()
        folder, main = Path(self.args.output_dir), self.args.should_save
        name = f"checkpoint-{self.state.global_step}"
        self.trained_on.launched_by = self._launched_by
        self.state.stateful_callbacks[TrainedOn.__name__] = self.trained_on.to_state()
        with (
            explained_failure(folder / name, what_is_intact(folder)),
            run_folder(folder).staged(edited=False, publishes=main) as self._staging,
        ):
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._name_best_checkpoint(folder, self._staging / name)
                if main:
                    refuse_missing_weights(self._staging / name)
            finally:
                self._staging = None
        self.accelerator.wait_for_everyone()  # or one could stage the next before this is gone
        self._has_spare_checkpoints = True
        if self._good_step == self.state.global_step:
            self.rotate_checkpoints()

    def _name_best_checkpoint(self, folder: Path, checkpoint: Path) -> None:
        """Let the state name the best checkpoint where it will be, not where it is staged."""
        target = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (target.name == checkpoint.name or target.is_dir()):
            self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(checkpoint / STATE_NAME))


def give_head_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float) -> None:
    """Move the parameters of a model's heads into groups of their own, with a learning rate."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = {id(p) for name in find_heads(base) for p in base.get_submodule(name).parameters()}
    for group in list(optimizer.param_groups):
        of_head = [p for p in group["params"] if id(p) in heads]
        if of_head:
            group["params"] = [p for p in group["params"] if id(p) not in heads]
            optimizer.add_param_group({**group, "params": of_head, "lr": rate})


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the accuracy of logits (N, C), or outputs that begin with them, against (N,)."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which a signal arrived, in all processes at the same step.

    The accelerator lets the processes agree; `notify` is called once when the signal arrives.
    """

    def __init__(self, accelerator: Accelerator, notify: Callable[[], None]) -> None:
        self._accelerator = accelerator
        self._notify = notify
        self._received = False
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, once any process was signalled."""
        received = self._received
        if self._accelerator.num_processes > 1:
            # A signal reaches processes at different steps; saving alone would wait for ever.
            if received:
                self._accelerator.set_trigger()
            received = self._accelerator.check_trigger()
        if received:
            self.stopped = True
            control.should_save = state.global_step > 0
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; a second one has its usual effect at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = dict[int, Any]()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def receive(number: int, frame: FrameType | None) -> None:
            self._received = True
            restore()
            self._notify()

        for number in _SIGNALS:
            before[number] = signal.signal(number, receive)
        try:
            yield
        finally:
            restore()
