"""Reinforcement learning by TRL: GRPO and RLOO. The model that is trained writes the answers.

It writes them with its columns in the weights (`pacatune.resident`), so that what is sampled is
what is trained. With `use_vllm`, vLLM writes them, and gets the columns after each step.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers.trainer_utils import SaveStrategy
from trl import GRPOTrainer, RLOOTrainer

from pacatune import resident
from pacatune.data.config import PromptDataConfig
from pacatune.data.formats import row_variables
from pacatune.data.prompts import prepare_prompts
from pacatune.integrations.trl import column_sync
from pacatune.training.language import Task
from pacatune.training.rewards import load_rewards
from pacatune.training.task import TaskData
from pacatune.training.trainer import RunTrainer


def prepare(task: Task) -> TaskData:
    """Read the prompts, and find the rewards."""
    length = task.config.training.max_completion_length or 0
    section = cast(PromptDataConfig, task.config.data)
    return TaskData(
        examples=prepare_prompts(section, task.tokenizer, num_new_tokens=length),
        columns=("row",),
        trainer_options={"reward_funcs": load_rewards(task.config.reward)},
        is_split_fixed=True,  # each process samples answers of its own
        length_option="`training.max_completion_length`, or shorten the prompts",
    )


class SamplingTrainer(RunTrainer):
    """Put before a trainer of TRL that samples answers: GRPOTrainer or RLOOTrainer.

    Answers are sampled from the very weights that are trained. Where they serve several steps, a
    checkpoint waits for the last of these: from there a resumed run samples what this one does.
    """

    prepare = staticmethod(prepare)

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        self._waiting: set[str] = set()
        self._variables: list[dict[str, Any]] = []
        with column_sync() if args.use_vllm else nullcontext():
            super().__init__(args=args, **kwargs)

    def num_items(self, inputs: dict[str, Any]) -> int | Tensor:
        """Return how many tokens of a micro-batch are not padding."""
        return inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Draw TRL's order anew in each epoch: its own generator begins again in a resumed run."""
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            sampler.set_epoch = lambda _: sampler.generator.manual_seed(
                self.args.seed + int(self.state.epoch or 0)
            )
        return sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Sample answers with the columns in the weights, in the format of the training pass."""
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with resident(self.accelerator.unwrap_model(self.model)), self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Tokenize prompts, each with the variables of the chat template that its row sets."""
        if not any(self._variables):
            return super()._tokenize_prompts(prompts)
        ids: list[Any] = []
        for prompt, variables in zip(prompts, self._variables, strict=True):
            self.chat_template_kwargs = variables
            ids += super()._tokenize_prompts([prompt])[0]
        self.chat_template_kwargs = {}
        return ids, None, {}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._variables = [*map(row_variables, inputs)]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return output

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


class GRPOSamplingTrainer(SamplingTrainer, GRPOTrainer):
    """TRL's for GRPO."""


class RLOOSamplingTrainer(SamplingTrainer, RLOOTrainer):
    """TRL's for RLOO."""
