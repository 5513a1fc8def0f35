"""One evaluation from beginning to end: data -> answers -> judgments -> table."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console

from experiments.mt_bench.answering import AnswerFile, answer_questions
from experiments.mt_bench.config import MtBenchConfig
from experiments.mt_bench.judging import Judge
from experiments.mt_bench.questions import (
    NUM_TURNS,
    Turn,
    add_references,
    read_prompts,
    read_questions,
    render,
)
from experiments.mt_bench.report import make_table, to_markdown
from pacatune.cli.options import build, parser_of, quiet_libraries
from pacatune.files.owned_folder import alone_in, to_json, write_whole
from pacatune.reports.provenance import sha256_of

RESULT_NAME, REPORT_NAME, SETTINGS_NAME = "mt_bench.json", "mt_bench.md", "answers.json"
_DECIDES = (
    *("questions", "model", "adapter", "quantization", "dtype"),
    *("chat_template", "max_new_tokens", "seed"),
)


def run_mt_bench(config: MtBenchConfig, console: Console, log: Console) -> dict[str, Any]:
    """Answer and judge what is not answered and judged yet; write, print and return the result.

    `log` gets progress and notes.
    """
    questions = read_questions(config.questions)
    prompts, folder = {}, config.output
    if config.judge_prompts is not None:
        questions = add_references(questions, config.references)
        prompts = read_prompts(config.judge_prompts)
    # What is missing is said before the model answers.
    model_id, _ = config.model_id, config.judge_key()
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _check_settings(config)
        write_whole(folder / RESULT_NAME, to_json({"finished": False}))
        file = AnswerFile(folder / "model_answer" / f"{model_id}.jsonl")
        answer_questions(config, questions, file, log)
        reasons = [why for one in questions for why in file.details(one, "finish_reason")]
        result = {
            "finished": True,
            "model_id": model_id,
            "questions": config.questions,
            "references": config.references,
            "cut_off": dict(Counter(why for why in reasons if why != "stop")),
        }
        if prompts:
            turns = [
                render(prompts, one, file.turns(one), number, config.judge_model)
                for one in questions
                for number in range(1, NUM_TURNS + 1)
            ]
            result |= _judged(config, turns, log)
            page = to_markdown(result)
            write_whole(folder / REPORT_NAME, page)
            console.print(page, markup=False, soft_wrap=True)
        write_whole(folder / RESULT_NAME, to_json(result))
    return result


def _check_settings(config: MtBenchConfig) -> None:
    """Note what makes a folder's answers; refuse to add some that are made otherwise."""
    given = json.loads(json.dumps(asdict(config), default=str))
    settings = {name: given[name] for name in _DECIDES}
    weights = Path(str(config.adapter), "adapter_model.safetensors").expanduser()
    settings["adapter_sha256"] = sha256_of(weights) if weights.is_file() else None
    path = config.output / SETTINGS_NAME
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    changed = [
        f"{name} was {old.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if old.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{config.output} holds answers made otherwise: {'; '.join(changed)}. Give the same "
            "options, or choose another folder: --output DIR."
        )
    write_whole(path, to_json(settings))


def _judged(config: MtBenchConfig, turns: Sequence[Turn], log: Console) -> dict[str, Any]:
    """Return what the result says about judge and scores."""
    name = config.judge_model.replace("/", "-")
    judge = Judge(config, config.output / "model_judgment" / f"{name}_single.jsonl")
    judgments = judge.judge(turns, log)
    about = {"model": config.judge_model, "url": config.judge_url}
    return {
        "judge": about | judge.used({turn.key for turn in turns}),
        "judge_prompts": str(config.judge_prompts),
        "seed": config.seed,
        "table": make_table(judgments, config.seed),
        "failures": [one for one in judgments if one["score"] is None],
    }


def main(words: list[str]) -> int:
    """Run what the words of a command line say; return its status: 1 if nothing was judged."""
    try:
        parser = parser_of("mt-bench", MtBenchConfig)
        parser.prog = "python -m experiments.mt_bench"
        config = build(MtBenchConfig, parser.parse_args(words))
        quiet_libraries()
        result = run_mt_bench(
            config, Console(highlight=False), Console(stderr=True, highlight=False)
        )
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, TemplateError) as error:
        print(f"mt_bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if config.judge_prompts is None or result["table"][-1]["num_judged"] else 1
