"""`pacatune evaluate perplexity`: perplexity and bits per byte of text."""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli import evaluate_options as shared
from pacatune.cli.options import positive, quiet_libraries

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel
    from pacatune.evaluation import TextScore
    from pacatune.evaluation.output import Report


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate perplexity` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from pacatune.evaluation.output import open_output
    from pacatune.evaluation.perplexity import default_text, evaluate_perplexity

    open_output(Path(options.output))
    texts = _read(options.text) if options.text else default_text()
    sizes = shared.values_of(options, "window", "stride", "max_tokens")

    def score(loaded: "LoadedModel") -> "Iterator[Report]":
        scores = evaluate_perplexity(
            loaded.model,
            loaded.tokenizer,
            texts,
            **sizes,
            batch_size=options.batch_size,
            progress=True,
        )
        yield make_report(scores)

    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return shared.evaluate("perplexity", argv, options, {**sizes, "text_sha256": hashes}, score)


def make_report(scores: "dict[str, TextScore]") -> "Report":
    """Return a row per text."""
    from pacatune.evaluation.output import Report

    def loss(score: "TextScore") -> str:
        spread = "" if score.loss_stderr is None else f" ± {score.loss_stderr:.4f}"
        return f"{score.loss:.4f}{spread}"

    return Report(
        title="perplexity",
        headings=["text", "loss", "perplexity", "bits per byte", "tokens", "bytes"],
        rows=[
            [
                name,
                loss(score),
                f"{score.perplexity:.3f}",
                f"{score.bits_per_byte:.4f}",
                f"{score.num_tokens:,}",
                f"{score.num_bytes:,}",
            ]
            for name, score in scores.items()
        ],
        result={
            name: {
                "loss": score.loss,
                "loss_stderr": score.loss_stderr,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
                "num_tokens": score.num_tokens,
                "num_bytes": score.num_bytes,
            }
            for name, score in scores.items()
        },
        notes=["Loss in nats per token ± standard error over windows."],
    )


def _read(files: list[str]) -> dict[str, str]:
    texts = {}
    for name in files:
        try:
            texts[name] = Path(name).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 ({error.reason}); convert it.") from error
    return texts


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = shared.model_parser(
        "perplexity", "Score a model on text: perplexity of its tokens, and bits per byte."
    )
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 (default: the manual that comes with Python, pydoc_data.topics)",
    )
    add(
        "--window",
        type=positive,
        metavar="N",
        help="tokens that are read at once (default: 1024, or the model's context if less)",
    )
    add(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens from one window to the next (default: half of the window)",
    )
    add("--max-tokens", type=positive, metavar="N", help="tokens of each text, the first ones")
    return parser.parse_args(argv)
