"""`pacatune evaluate WHAT`: score a model, with or without an adapter."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from pacatune.cli.options import ModelOptions, print_notes, quiet_libraries
from pacatune.precision import Dtype

if TYPE_CHECKING:
    from pacatune.evaluation import ChoiceResult, TextScore
    from pacatune.evaluation.harness import TaskScores
    from pacatune.evaluation.output import Report

# Takes model, tokenizer, `batch_size` and `progress`; yields the report, again with every further
# part that is known.
Score = Callable[..., "Iterable[Report]"]

DESCRIPTION = "Score a model, with or without an adapter."


@dataclass(frozen=True, kw_only=True)
class Evaluation(ModelOptions):
    """An evaluation that loads a model."""

    output: str
    """New folder of the result."""
    dtype: Dtype = "auto"
    """Number type of the base; auto is its own."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the base in fewer bits, as `train --model.quantization`; a PaCA adapter trained so does
    it by itself."""
    batch_size: PositiveInt = 8
    """Examples evaluated at once; more is faster on a GPU."""

    def prepare(self) -> tuple[dict[str, Any], Score]:
        """Read what is scored on; return settings beside the options, and what scores."""
        raise NotImplementedError

    def run(self, command: str) -> int:
        """Score the model, write and print the report; return the exit status."""
        self.check_base(self.output)
        quiet_libraries()
        found, score = self.prepare()
        own = [f.name for f in fields(self) if f not in fields(Evaluation)]
        settings = self.values(*own, "quantization", "batch_size") | found

        from pacatune import resident
        from pacatune.adapters.loading import load_language_model
        from pacatune.evaluation.output import describe, open_output, write_report

        output = Path(self.output)
        open_output(output)
        how = self.values("dtype", "device", "quantization", "allow_other_base")
        loaded = load_language_model(self.model, self.adapter, **how)
        print_notes(loaded.notes)
        head = describe(loaded, command, settings)
        speed = {"batch_size": self.batch_size, "progress": True}
        with resident(loaded.model):  # it is this command's alone
            for report in score(loaded.model, loaded.tokenizer, **speed):
                write_report(output, head, report, finished=False)
        write_report(output, head, report, finished=True)
        print(report.title, *report.table().plain(), *report.notes, sep="\n")
        print(f"wrote {output}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Questions(Evaluation):
    """An evaluation that asks questions."""

    limit: PositiveInt | None = None
    """Questions of each task, subject or file, the first ones."""
    chat: bool = False
    """Ask by the model's chat template."""


@dataclass(frozen=True, kw_only=True)
class LmEval(Questions):
    """Score a model on any tasks of lm-eval."""

    tasks: tuple[str, ...]
    """Such as arc_easy."""
    tasks_dir: str | None = None
    """Folder with task files of your own, taken instead; paths of data in them are relative to
    it."""
    num_fewshot: int | None = None
    """Examples in each prompt; by default what the tasks say."""
    seed: int = 0
    """Seed for drawing the examples."""

    def prepare(self) -> tuple[dict[str, Any], Score]:
        """Find the tasks."""
        from pacatune.evaluation.tasks import evaluate_tasks, prepare_tasks

        tasks = prepare_tasks(list(self.tasks), self.tasks_dir)
        asked = self.values("num_fewshot", "limit", "chat", "seed")

        def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
            yield lm_eval_report(evaluate_tasks(model, tokenizer, tasks, **asked, **speed))

        return {}, score


@dataclass(frozen=True, kw_only=True)
class Mmlu(LmEval):
    """Score a model on MMLU by lm-eval: its four categories and all questions, as in the paper."""

    tasks: tuple[str, ...] = ("mmlu",)
    """Parts of it, such as mmlu_stem or mmlu_anatomy."""
    num_fewshot: int | None = 5
    """Examples in each prompt."""


def lm_eval_report(scores: "TaskScores") -> "Report":
    """Return a row per metric of a task or group; tasks within a group are in the JSON alone."""
    from pacatune.evaluation.output import Report, result_dict

    result = result_dict(scores)
    result["task_versions"] = result.pop("versions")
    within = {name for members in scores.groups.values() for name in members} - set(scores.groups)
    cut = (
        f"{scores.num_truncated} prompts are longer than the model's context and lost their start."
    )
    return Report(
        title="lm-eval",
        headings=["task", "metric", "value", "standard error", "questions", "examples"],
        rows=[
            [
                task,
                metric,
                f"{score.value:.4f}",
                "-" if score.stderr is None else f"{score.stderr:.4f}",
                str(score.num_questions),
                str(scores.num_fewshot.get(task, "-")),
            ]
            for task, metrics in scores.tasks.items()
            if task not in within
            for metric, score in metrics.items()
        ],
        result=result,
        notes=[cut] if scores.num_truncated else [],
        questions=scores.questions,
    )


@dataclass(frozen=True, kw_only=True)
class Choice(Questions):
    """Score a model on multiple-choice questions by the likelihood of each choice."""

    data: list[str]
    """.jsonl files with question, choices, answer."""

    def prepare(self) -> tuple[dict[str, Any], Score]:
        """Read the questions."""
        from pacatune.evaluation.choice import evaluate_choice, read_questions
        from pacatune.evaluation.harness import require_lm_eval

        require_lm_eval()
        data = {path: read_questions(path) for path in dict.fromkeys(self.data)}

        def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
            speed |= self.values("limit", "chat")
            results = {}
            for name, questions in data.items():
                results[name] = evaluate_choice(model, tokenizer, questions, **speed)
                yield _choice_report(results)

        return {}, score


def _choice_report(results: "dict[str, ChoiceResult]") -> "Report":
    """Return a row per data set."""
    from pacatune.evaluation.output import Report, percent, result_dict

    notes = ["Accuracy in % ± standard error; `per character`: by log-likelihood per character."]
    for name, result in results.items():
        if result.num_truncated:
            notes.append(
                f"{name}: {result.num_truncated} questions are longer than the model's context and "
                "lost their start."
            )
    return Report(
        title="multiple choice",
        headings=["data", "accuracy", "per character", "chance", "questions"],
        rows=[
            [
                name,
                percent(result.accuracy),
                percent(result.accuracy_normalised),
                f"{100 * result.chance:.1f}",
                str(result.accuracy.num_questions),
            ]
            for name, result in results.items()
        ],
        result={name: result_dict(result) for name, result in results.items()},
        notes=notes,
        questions=[
            {"data": name, **each} for name, result in results.items() for each in result.questions
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluation):
    """Score a model on text: perplexity of its tokens, and bits per byte."""

    text: list[str] | None = None
    """UTF-8 files; by default the manual that comes with Python, pydoc_data.topics."""
    window: PositiveInt | None = None
    """Tokens that are read at once; by default 1024, or the model's context if less."""
    stride: PositiveInt | None = None
    """Tokens from one window to the next; by default half of the window."""
    max_tokens: PositiveInt | None = None
    """Tokens of each text, the first ones."""

    def prepare(self) -> tuple[dict[str, Any], Score]:
        """Read the texts."""
        from pacatune.evaluation.perplexity import default_text, evaluate_perplexity

        texts = {} if self.text else default_text()
        for name in self.text or ():
            try:
                texts[name] = Path(name).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"`text` ({name!r}) is no file in UTF-8: {error}.") from error
        sizes = self.values("window", "stride", "max_tokens")

        def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
            yield _perplexity_report(evaluate_perplexity(model, tokenizer, texts, **sizes, **speed))

        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        return {"text_sha256": hashes}, score


def _perplexity_report(scores: "dict[str, TextScore]") -> "Report":
    """Return a row per text."""
    from pacatune.evaluation.output import Report, result_dict

    rows, result = [], {}
    for name, score in scores.items():
        spread = "" if score.loss_stderr is None else f" ± {score.loss_stderr:.4f}"
        rows.append(
            [
                name,
                f"{score.loss:.4f}{spread}",
                f"{score.perplexity:.3f}",
                f"{score.bits_per_byte:.4f}",
                f"{score.num_tokens:,}",
                f"{score.num_bytes:,}",
            ]
        )
        derived = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        result[name] = result_dict(score) | derived
    return Report(
        title="perplexity",
        headings=["text", "loss", "perplexity", "bits per byte", "tokens", "bytes"],
        rows=rows,
        result=result,
        notes=["Loss in nats per token ± standard error over windows."],
    )


SUBCOMMANDS = {
    "mmlu": Mmlu,
    "lm-eval": LmEval,
    "choice": Choice,
    "perplexity": Perplexity,
}
