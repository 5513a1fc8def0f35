"""Training on preferences by TRL: DPO, KTO and reward models.

The reference of DPO and KTO is the model itself with the adapter off; no second one is loaded.
"""

from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference, suppress_seqcls_warning

from pacatune.data import PreparedData
from pacatune.data.preference import (
    JUDGED_COLUMNS,
    PAIR_COLUMNS,
    SCORED_COLUMNS,
    prepare_judged,
    prepare_pairs,
)
from pacatune.training.language import C, LanguageTrainer, MetricTask, find_stop_ids
from pacatune.training.metrics import (
    JudgedReport,
    MetricReport,
    PreferenceReport,
    RewardModelReport,
)
from pacatune.training.preference_config import DpoRunConfig, KtoRunConfig, RewardRunConfig


class PreparedTrainer(LanguageTrainer):
    """Put before a trainer of TRL that would encode its data: ours is already encoded."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class DpoRunTrainer(PreparedTrainer, DPOTrainer):
    """DPOTrainer with what the recipe needs."""


class KtoRunTrainer(PreparedTrainer, KTOTrainer):
    """KTOTrainer with what the recipe needs."""


class RewardRunTrainer(PreparedTrainer, RewardTrainer):
    """RewardTrainer with what the recipe needs."""


class PreferenceTask(MetricTask[C]):
    """A run on answers that are preferred or not."""

    report_class: ClassVar[type[MetricReport]] = PreferenceReport
    trainer_class: ClassVar[Any]
    answers: ClassVar[dict[str, str]]
    """Column with an answer's tokens -> style in which it is shown."""

    def read_data(self) -> PreparedData:
        """Encode pairs of answers."""
        return prepare_pairs(self.config.data, self.tokenizer, **read_options(self))

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> Any:
        """Return TRL's trainer, which puts the adapter on the model."""
        return self.trainer_class(
            model=model, processing_class=self.tokenizer, peft_config=adapter_config, **options
        )

    def learned(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return the prompt and the first answer, which is learned."""
        prompt, answer = row["prompt_ids"], row[next(iter(self.answers))]
        ids, labels = [*prompt, *answer], [*[-100] * len(prompt), *answer]
        limit = self.config.training.max_length
        return {"input_ids": ids[:limit], "labels": labels[:limit]}

    def show(self, data: Dataset, num_examples: int, console: Console) -> None:
        """Print prompts and answers."""
        for row in data.select(range(min(num_examples, len(data)))):
            console.rule()
            console.print(row["place"], markup=False, highlight=False, soft_wrap=True)
            if "prompt_ids" in row:
                console.print(Text(self.tokenizer.decode(row["prompt_ids"]), style="dim"))
            for name, style in self.answers.items():
                what = self.name_answer(row, name)
                console.print(f"{what} ({len(row[name])} tokens):", highlight=False)
                console.print(Text(self.tokenizer.decode(row[name]), style=style))
        console.rule()

    def name_answer(self, row: dict[str, Any], column: str) -> str:
        """Return what an answer is called where it is shown."""
        return column.removesuffix("_ids")


class DpoTask(PreferenceTask[DpoRunConfig]):
    """A run of Direct Preference Optimization."""

    tags = ("dpo", "trl")
    columns = PAIR_COLUMNS
    trainer_class = DpoRunTrainer
    answers: ClassVar[dict[str, str]] = {"chosen_ids": "green", "rejected_ids": "red"}


class KtoTask(PreferenceTask[KtoRunConfig]):
    """A run of Kahneman-Tversky Optimization."""

    tags = ("kto", "trl")
    fixed_split = "KTO compares an answer with its neighbour in the batch of a process"
    columns = JUDGED_COLUMNS
    trainer_class = KtoRunTrainer
    report_class = JudgedReport
    answers: ClassVar[dict[str, str]] = {"completion_ids": "green"}

    def read_data(self) -> PreparedData:
        """Encode judged answers, each beside the answer of its neighbour in the batch."""
        config = self.config
        data = prepare_judged(config.data, self.tokenizer, **read_options(self))
        train, evaluation = data.train, data.evaluation
        if config.training.loss_type != "apo_zero_unpaired":
            size = config.training.per_device_train_batch_size
            train = with_neighbours(train, size)
            if evaluation is not None:
                evaluation = with_neighbours(evaluation, size)
        return PreparedData(train, evaluation, data.longest, data.warnings)

    def name_answer(self, row: dict[str, Any], column: str) -> str:
        """Return whether the answer is desirable."""
        return "desirable" if row["label"] else "undesirable"


class RewardTask(PreferenceTask[RewardRunConfig]):
    """A run of a reward model, whose head is new and saved with the adapter."""

    tags = ("reward-trainer", "trl")
    pipeline_tag = "text-classification"
    columns = SCORED_COLUMNS
    trainer_class = RewardRunTrainer
    report_class = RewardModelReport
    answers: ClassVar[dict[str, str]] = {"chosen_ids": "green", "rejected_ids": "red"}
    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    model_options: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def read_data(self) -> PreparedData:
        """Encode pairs of whole texts."""
        return prepare_pairs(self.config.data, self.tokenizer, scored=True, **read_options(self))

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some pairs as one padded batch: preferred texts first, then the others."""
        padding = self.tokenizer.pad_token_id
        collator = DataCollatorForPreference(
            pad_token_id=self.tokenizer.eos_token_id if padding is None else padding
        )
        rows = [examples[place] for place in places]
        return dict(collator([{name: row[name] for name in self.columns} for row in rows]))

    def load_model(self) -> nn.Module:
        """Load the weights of the base under a new head."""
        with suppress_seqcls_warning():  # that the head is new
            return super().load_model()

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of scores, which the model itself does not know."""
        chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
        return -logsigmoid(chosen - rejected).mean()

    def _commands(self, model: str) -> str:
        """Return the command that makes a plain model; others are for models that write."""
        return f"```bash\npacatune merge --model {model} --adapter FOLDER --output MERGED\n```\n\n"


def read_options(task: PreferenceTask[Any]) -> dict[str, Any]:
    """Return what reading the data takes of a run."""
    training = task.config.training
    return {
        "max_length": training.max_length,
        "stop_ids": find_stop_ids(task.config, task.tokenizer),
        "num_processes": training.dataset_num_proc,
    }


def with_neighbours(data: Dataset, batch_size: int) -> Dataset:
    """Give each row the answer of the one before it in its batch, the first that of the last."""
    answers = data["completion_ids"][:]
    starts = range(0, len(answers), batch_size)
    batches = [answers[start : start + batch_size] for start in starts]
    shifted = [answer for batch in batches for answer in [batch[-1], *batch[:-1]]]
    return data.add_column("KL_completion_ids", shifted, feature=data.features["completion_ids"])
