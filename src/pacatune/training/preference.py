"""Data of preferences for TRL: DPO, KTO and reward models.

The reference of DPO and KTO is the model itself with the adapter off; no second one is loaded.
"""

from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.reward_trainer import DataCollatorForPreference

from pacatune.data import PreparedData
from pacatune.data.encode import Encoder
from pacatune.data.preference import prepare_judged, prepare_pairs
from pacatune.training.language import LanguageTask, LanguageTrainer, find_stop_ids, pad_id


class PreparedTrainer(LanguageTrainer):
    """Put before a trainer of TRL that would encode its data: ours is already encoded."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def prepare_dpo(task: LanguageTask) -> PreparedData:
    """Encode pairs of answers."""
    return prepare_pairs(*_encoding(task))


def prepare_kto(task: LanguageTask) -> PreparedData:
    """Encode judged answers, each beside the answer of its neighbour in the batch, if TRL asks."""
    training = task.config.training
    data = prepare_judged(*_encoding(task))
    if training.loss_type == "apo_zero_unpaired":
        return data
    size = training.per_device_train_batch_size
    evaluation = None if data.evaluation is None else with_neighbours(data.evaluation, size)
    return replace(data, train=with_neighbours(data.train, size), evaluation=evaluation)


def prepare_reward(task: LanguageTask) -> PreparedData:
    """Encode pairs of whole texts; the model gets a new head, saved with the adapter."""
    task.model_options = {"num_labels": 1}
    task.collator = DataCollatorForPreference(pad_token_id=pad_id(task.tokenizer))
    task.loss = loss_of_scores
    return prepare_pairs(*_encoding(task, learn_all=True))


def loss_of_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of scores, which the model itself does not know.

    The batch has the preferred texts first, then the others.
    """
    chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def _encoding(task: LanguageTask, learn_all: bool = False) -> tuple[Any, Encoder, int | None]:
    """Return what the preparation of the data takes."""
    config, training = task.config, task.config.training
    encoder = Encoder(
        tokenizer=task.tokenizer,
        stop_ids=find_stop_ids(config, task.tokenizer),
        max_length=training.max_length,
        learn_all=learn_all,
    )
    return config.data, encoder, training.dataset_num_proc


def with_neighbours(data: Dataset, batch_size: int) -> Dataset:
    """Give each row the answer of the one before it in its batch, the first that of the last."""
    answers = data["completion_ids"][:]
    starts = range(0, len(answers), batch_size)
    batches = [answers[start : start + batch_size] for start in starts]
    shifted = [answer for batch in batches for answer in [batch[-1], *batch[:-1]]]
    return data.add_column("KL_completion_ids", shifted, feature=data.features["completion_ids"])
