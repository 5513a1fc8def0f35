"""Reinforcement learning by TRL: GRPO and RLOO. The model that is trained writes the answers.

It writes them with its columns in the weights (`pacatune.resident`), so that what is sampled is
what is trained; `sampling/sampling_logp_difference` in the log says how far the two are apart. With
`use_vllm`, vLLM writes them, and gets the columns after each step.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import LogitsProcessor, StoppingCriteria
from transformers.trainer_utils import SaveStrategy

from pacatune import resident
from pacatune.data import PreparedData
from pacatune.data.prompts import prepare_prompts
from pacatune.integrations.trl import column_sync
from pacatune.training.config_file import CONFIG_NAME
from pacatune.training.language import LanguageTask, LanguageTrainer
from pacatune.training.output import last_checkpoint
from pacatune.training.rewards import RewardError, load_rewards

_DIFFERENCE = "sampling/sampling_logp_difference"


class SampledLogProbs:
    """Keeps the log-probability of each token that a model samples, as it was when sampled."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._newest: Tensor | None = None
        self._kept: list[Tensor] = []

    @contextmanager
    def listening(self, model: Any) -> Iterator[None]:
        """Keep what `model.generate` samples inside this block."""
        plain = model.generate
        model.generate = partial(
            plain, logits_processor=[_Scores(self)], stopping_criteria=[_Tokens(self)]
        )
        try:
            yield
        finally:
            del model.generate  # the instance's; the class has its own

    def see_scores(self, scores: Tensor) -> None:
        """Take the logits (B, V) of the next tokens."""
        self._newest = (scores.float() / self._temperature).log_softmax(-1)

    def see_tokens(self, tokens: Tensor) -> None:
        """Take the tokens (B,) that were sampled from the last logits."""
        assert self._newest is not None, "logits come first"
        self._kept.append(self._newest.gather(1, tokens[:, None]))
        self._newest = None

    def matrix(self, length: int) -> Tensor:
        """Return the log-probabilities (B, `length`); 0 behind the last token."""
        kept = torch.cat(self._kept, dim=1)[:, :length]
        return nn.functional.pad(kept, (0, length - kept.shape[1]))


class _Scores(LogitsProcessor):
    def __init__(self, kept: SampledLogProbs) -> None:
        self._kept = kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._kept.see_scores(scores)
        return scores


class _Tokens(StoppingCriteria):
    def __init__(self, kept: SampledLogProbs) -> None:
        self._kept = kept

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._kept.see_tokens(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class EpochSampler(Sampler[int]):
    """TRL's order of prompts, drawn anew in each epoch from the seed and the epoch's number.

    TRL's own generator goes on from epoch to epoch, and a resumed run would begin with that of the
    first again.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator.manual_seed(self._seed + self._epoch())
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class SamplingTrainer(LanguageTrainer):
    """Put before a trainer of TRL that samples answers: GRPOTrainer or RLOOTrainer.

    Answers are sampled from the very weights that are trained. Where they serve several steps, a
    checkpoint waits for the last of these: from there a resumed run samples what this one does.
    """

    def __init__(self, *, resume_command: str, args: Any, **kwargs: Any) -> None:
        self._resume_command = resume_command
        self._sampled = SampledLogProbs(1.0)
        self._logps: Tensor | None = None
        self._waiting: set[str] = set()
        with column_sync() if args.use_vllm else nullcontext():
            super().__init__(args=args, **kwargs)

    def num_items(self, inputs: dict[str, Any]) -> int | Tensor:
        """Return how many tokens of a micro-batch are not padding."""
        return inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if not self.shuffle_dataset:
            return sampler
        return EpochSampler(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss; compare the log-probabilities with those that were sampled."""
        self._logps = None
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.use_vllm:  # TRL compares by itself
            return loss
        # Only until the weights change do both belong to the same ones.
        is_new = bool((inputs["sampled_at"] == self.state.global_step).all())
        if is_new and self._logps is not None:
            mask = inputs["completion_mask"].bool()
            gap = (self._logps - inputs["sampled_logps"]).abs()[mask]
            mode = "train" if self.model.training else "eval"
            for name, value in (("mean", gap.mean()), ("max", gap.max())):
                found = self.accelerator.gather(value)
                found = found.mean() if name == "mean" else found.max()
                self._metrics[mode][f"{_DIFFERENCE}/{name}"].append(found.item())
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = result[0].detach()
        return result

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self._sampled = SampledLogProbs(self.temperature)
        with resident(model), self._sampled.listening(model), self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.use_vllm:
            return output
        output["sampled_logps"] = self._sampled.matrix(output["completion_ids"].shape[1])
        output["sampled_at"] = torch.full_like(output["advantages"], self.state.global_step)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super()._calculate_rewards(*args, **kwargs)
        except RewardError as error:
            raise RewardError(f"{error} {self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        kept = last_checkpoint(Path(self.args.output_dir))
        if kept is None:
            return "No checkpoint was saved yet; mend the function, then start again."
        return (
            f"{kept} is the last checkpoint: mend the function, then continue with "
            f"`{self._resume_command}`."
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Let checkpoints and a stop wait while answers are left to train on.

        A resumed run could not sample these again: the weights have changed since. An evaluation
        that chooses the best checkpoint waits with it.
        """
        names = {"should_save", "should_training_stop"}
        if self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST:
            names.add("should_evaluate")
        asked = {name for name in names if getattr(self.control, name)} | self._waiting
        is_left = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        self._waiting = (
            asked if is_left and self.state.global_step < self.state.max_steps else set()
        )
        for name in names:
            setattr(self.control, name, name in asked - self._waiting)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; no result is worse than that of an evaluation in which no answer was scored."""
        if self.log_completions and self.args.should_save:
            # TRL makes it before the folder of an older run is cleared.
            (Path(self.args.output_dir) / "completions").mkdir(parents=True, exist_ok=True)
        super().log(logs, *args, **kwargs)
        if logs.get("eval_reward", 0) is None:
            logs["eval_reward"] = math.nan


def prepare(task: LanguageTask) -> PreparedData:
    """Read the prompts, and find the rewards."""
    config, training = task.config, task.config.training
    if (system := training.chat_template_kwargs) and not task.tokenizer.chat_template:
        raise ValueError(
            f"`training.chat_template_kwargs` ({system}) needs a chat template; give "
            "`data.chat_template`, or drop the option."
        )
    task.less_memory = task.less_memory.replace("max_length", "max_completion_length")
    task.length_option = "`training.max_completion_length`, or shorten the prompts"
    length = training.max_completion_length or 0
    data = prepare_prompts(config.data, task.tokenizer, num_new_tokens=length)
    path = Path(str(training.output_dir)) / CONFIG_NAME
    task.trainer_options = {
        "reward_funcs": list(load_rewards(config.reward, config.data, list(data.train[0]))),
        "resume_command": f"{config.repeat_command(path)} --resume",
    }
    return data
