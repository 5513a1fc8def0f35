"""`pacatune evaluate perplexity`: perplexity and bits per byte of text."""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.evaluate import Score, values_of
from pacatune.cli.options import positive

if TYPE_CHECKING:
    from pacatune.evaluation import TextScore
    from pacatune.evaluation.output import Report

DESCRIPTION = "Score a model on text: perplexity of its tokens, and bits per byte."


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of this evaluation alone."""
    text = "UTF-8 (default: the manual that comes with Python, pydoc_data.topics)"
    add("--text", nargs="+", metavar="FILE", help=text)
    for name, text in (
        ("window", "tokens that are read at once (default: 1024, or the model's context if less)"),
        ("stride", "tokens from one window to the next (default: half of the window)"),
        ("max-tokens", "tokens of each text, the first ones"),
    ):
        add(f"--{name}", type=positive, metavar="N", help=text)


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Score]:
    """Return the settings, and what scores; see `evaluate`."""
    from pacatune.evaluation.perplexity import default_text, evaluate_perplexity

    texts = _read(options.text) if options.text else default_text()
    sizes = values_of(options, "window", "stride", "max_tokens")

    def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
        yield _report(evaluate_perplexity(model, tokenizer, texts, **sizes, **speed))

    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {**sizes, "text_sha256": hashes}, score


def _report(scores: "dict[str, TextScore]") -> "Report":
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


def _read(files: list[str]) -> dict[str, str]:
    texts = {}
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{name!r} is not a file; check `--text`.")
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 ({error.reason}); convert it.") from error
    return texts
