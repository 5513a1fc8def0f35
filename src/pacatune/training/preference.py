"""Data of preferences for TRL: DPO, KTO and reward models.

The reference of DPO and KTO is the model itself with the adapter off; no second one is loaded.
"""

from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from pacatune.data.preference import prepare_judged, prepare_pairs
from pacatune.training.language import Task, pad_id
from pacatune.training.task import TaskData
from pacatune.training.trainer import RunTrainer


class PreparedTrainer(RunTrainer):
    """Put before a trainer of TRL that would encode its data: ours is already encoded."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def prepare_dpo(task: Task) -> TaskData:
    """Encode pairs of answers."""
    number = task.config.training.dataset_num_proc
    return TaskData(
        examples=prepare_pairs(task.config.data, task.encoder(), number),
        columns=("prompt_ids", "chosen_ids", "rejected_ids"),
    )


def prepare_kto(task: Task) -> TaskData:
    """Encode judged answers, each beside the answer of its neighbour in the batch, if TRL asks."""
    training = task.config.training
    data = prepare_judged(task.config.data, task.encoder(), training.dataset_num_proc)
    if training.loss_type != "apo_zero_unpaired":
        size, held_out = training.per_device_train_batch_size, data.evaluation
        held_out = None if held_out is None else with_neighbours(held_out, size)
        data = replace(data, train=with_neighbours(data.train, size), evaluation=held_out)
    return TaskData(
        examples=data,
        columns=("prompt_ids", "completion_ids", "label"),
        is_split_fixed=True,  # an answer is compared with its neighbour in the batch of a process
    )


def prepare_reward(task: Task) -> TaskData:
    """Encode pairs of whole texts; the model gets a new head, saved with the adapter."""
    number = task.config.training.dataset_num_proc
    return TaskData(
        examples=prepare_pairs(task.config.data, task.encoder(learn_all=True), number),
        columns=("chosen_ids", "rejected_ids"),
        collator=DataCollatorForPreference(pad_token_id=pad_id(task.tokenizer)),
        loss=loss_of_scores,
        model_options={"num_labels": 1},
    )


class PairTrainer(PreparedTrainer, DPOTrainer):
    """TRL's for DPO."""

    prepare = staticmethod(prepare_dpo)


class JudgedTrainer(PreparedTrainer, KTOTrainer):
    """TRL's for KTO."""

    prepare = staticmethod(prepare_kto)


class ScoreTrainer(PreparedTrainer, RewardTrainer):
    """TRL's for reward models."""

    prepare = staticmethod(prepare_reward)


def loss_of_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of scores, which the model itself does not know.

    The batch has the preferred texts first, then the others.
    """
    chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def with_neighbours(data: Dataset, batch_size: int) -> Dataset:
    """Give each row the answer of the one before it in its batch, the first that of the last."""
    answers = data["completion_ids"][:]
    starts = range(0, len(answers), batch_size)
    batches = [answers[start : start + batch_size] for start in starts]
    shifted = [answer for batch in batches for answer in [batch[-1], *batch[:-1]]]
    return data.add_column("KL_completion_ids", shifted, feature=data.features["completion_ids"])
