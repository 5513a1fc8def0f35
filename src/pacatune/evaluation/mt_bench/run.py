"""One evaluation from beginning to end: data -> answers -> judgments -> table."""

import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from pacatune.evaluation.mt_bench.answering import AnswerFile, answer_questions, read_answers
from pacatune.evaluation.mt_bench.client import JudgeClient
from pacatune.evaluation.mt_bench.config import (
    SETTINGS_NAME,
    MtBenchConfig,
    answer_settings,
    check_settings,
    write_settings,
)
from pacatune.evaluation.mt_bench.judging import Judge
from pacatune.evaluation.mt_bench.questions import Data, Question, QuestionId, load_data
from pacatune.evaluation.mt_bench.report import (
    NUM_RESAMPLES,
    draw_radar,
    make_table,
    print_result,
    to_markdown,
)
from pacatune.files.owned_folder import OwnedFolder

RESULT_NAME, REPORT_NAME, RADAR_NAME = "mt_bench.json", "mt_bench.md", "radar.png"
_NUM_PROGRESS_LINES = 20

Answers = Mapping[QuestionId, Sequence[str]]
Say = Callable[[str], None]


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end this block as Ctrl-C does: paid replies are kept. A second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_mt_bench(config: MtBenchConfig, console: Console, log: Console) -> dict[str, Any]:
    """Answer and judge what is not answered and judged yet; write and print the result.

    Args:
        config: What to do.
        console: Gets the result.
        log: Gets progress and notes.

    Returns:
        What mt_bench.json holds.
    """

    def say(line: str) -> None:
        log.print(line, soft_wrap=True, markup=False, highlight=False)

    client = None if config.no_judge else _client(config)
    data = load_data(config)
    subject = _subject(config, data.questions)
    if client is not None:
        if client.shows_key:
            say(f"note: the judge's key goes to {client.url} unencrypted; use https if it can.")
        client.check_reachable()
    folder = OwnedFolder(path=config.output, kind="an MT-Bench evaluation")
    outputs = (RESULT_NAME, REPORT_NAME, RADAR_NAME, SETTINGS_NAME)
    with folder.going_on(*outputs), termination_interrupts():
        folder.write_json(RESULT_NAME, {"finished": False})
        for grows in ("model_answer/*.jsonl", "model_judgment/*.jsonl"):
            folder.claim(grows)
        answers = subject.answers
        cut_off: dict[str, int] = {}
        if answers is None:
            write_settings(folder, subject.made_by)
            answers, cut_off = _answer(config, data.questions, subject, say)
        result = {
            "finished": True,
            "model_id": subject.model_id,
            "sources": data.sources,
            "num_questions": len(data.questions),
            "answers": subject.made_by,
            "cut_off": cut_off,
        }
        if client is None:
            say(f"the answers are in {_answer_path(config, subject)}; they are not judged.")
        else:
            result |= _judge(config, data, client, subject.model_id, answers, say)
            _write_report(folder, result)
            print_result(result, console)
        folder.write_json(RESULT_NAME, result)
    return result


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """Who is evaluated."""

    model_id: str
    made_by: dict[str, Any]
    """What the answers come from."""
    template: str | None = None
    """Chat template that replaces the tokenizer's."""
    answers: Answers | None = None
    """Those that are there already."""


def _subject(config: MtBenchConfig, questions: Sequence[Question]) -> _Subject:
    """Find out who is evaluated, and that the folder holds nobody else's answers."""
    if config.answers is not None:
        own_id, answers = read_answers(config.answers, questions)
        model_id = config.model_id or own_id or Path(config.answers).stem
        return _Subject(model_id=model_id, made_by={"file": config.answers}, answers=answers)
    folders = [Path(one).expanduser().resolve() for one in (config.model, config.adapter) if one]
    model_id = config.model_id or "+".join(folder.name for folder in folders)
    template = None
    if (path := config.chat_template) is not None:
        if not path.is_file():
            raise FileNotFoundError(f"--chat-template ({path}) is no file; check the path.")
        template = path.read_text(encoding="utf-8")
    made_by = answer_settings(config, model_id, template)
    check_settings(config.output, made_by)
    return _Subject(model_id=model_id, made_by=made_by, template=template)


def _client(config: MtBenchConfig) -> JudgeClient:
    assert config.judge_url is not None
    return JudgeClient(
        url=config.judge_url,
        model=config.judge_model,
        key=config.judge_key(),
        timeout_s=config.judge_timeout_s,
        max_retries=config.judge_retries,
        max_tokens=config.judge_max_tokens,
    )


def _answer(
    config: MtBenchConfig, questions: Sequence[Question], subject: _Subject, say: Say
) -> tuple[Answers, dict[str, int]]:
    """Return all answers, and how many turns were cut off, by reason."""
    file = AnswerFile(_answer_path(config, subject), subject.model_id)
    if not all(map(file.is_complete, questions)):
        from pacatune.adapters.generation import TextGenerator

        generator = TextGenerator(
            config.model,
            config.adapter,
            dtype=config.dtype,
            device=config.device,
            allow_other_base=config.allow_other_base,
            quantization=config.quantization,
            chat_template=subject.template,
        )
        for note in generator.notes:
            say(f"note: {note}")
        answer_questions(
            generator,
            questions,
            file,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
            on_done=_progress("answered", "questions", say),
        )
    reasons = Counter(reason for one in questions for reason in file.details(one)["finish_reason"])
    del reasons["stop"]
    return {one.id: file.turns(one) for one in questions}, dict(reasons)


def _judge(
    config: MtBenchConfig,
    data: Data,
    client: JudgeClient,
    model_id: str,
    answers: Answers,
    say: Say,
) -> dict[str, Any]:
    """Return what the result says about judge and scores."""
    judge = Judge(
        client,
        data.prompts,
        config.output / "model_judgment" / f"{_file_name(client.model)}_single.jsonl",
        model_id=model_id,
        max_attempts=config.judge_attempts,
        parallel=config.judge_parallel,
        say=say,
    )
    for note in judge.notes:
        say(f"note: {note}")
    judgments = judge.judge(data.questions, answers, _progress("judged", "turns", say))
    used = judge.used({one.key for one in judgments})
    about = {"model": client.model, "url": client.url, "max_tokens": client.max_tokens}
    return {
        "judge": about | used,
        "seed": config.seed,
        "num_resamples": NUM_RESAMPLES,
        "table": make_table(judgments, config.seed),
        "failures": [
            {"question_id": one.question_id, "turn": one.turn, "problem": one.problem}
            for one in judgments
            if one.score is None
        ],
    }


def _write_report(folder: OwnedFolder, result: dict[str, Any]) -> None:
    title = f"MT-Bench: {result['model_id']}\njudged by {result['judge']['model']}"
    with folder.staged() as staging:
        is_drawn = draw_radar(result["table"], title, staging / RADAR_NAME)
    folder.write(REPORT_NAME, to_markdown(result, RADAR_NAME if is_drawn else None))


def _progress(verb: str, unit: str, say: Say) -> Callable[[int, int], None]:
    last = -1

    def show(done: int, total: int) -> None:
        nonlocal last
        step = done * _NUM_PROGRESS_LINES // max(total, 1)
        if step != last or done == total:
            say(f"{verb} {done} of {total} {unit}")
        last = step

    return show


def _answer_path(config: MtBenchConfig, subject: _Subject) -> Path:
    return config.output / "model_answer" / f"{_file_name(subject.model_id)}.jsonl"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name).lstrip(".") or "unnamed"
