"""`pacatune generate`: stream text from a model, with or without an adapter."""

import argparse
import sys
import unicodedata
from typing import TYPE_CHECKING

from pacatune.adapters.sampling import Sampling
from pacatune.cli.options import (
    add_base_options,
    check_base,
    new_parser,
    print_notes,
    quiet_libraries,
)
from pacatune.names import full_name
from pacatune.precision import DTYPES

if TYPE_CHECKING:
    from pacatune.adapters.generation import TextGenerator


def run(argv: list[str]) -> int:
    """Run `pacatune generate` with the words after it; return the exit status."""
    options = _parse(argv)
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    check_base(options)
    prompt = _read_prompt(options.prompt)
    quiet_libraries()

    from pacatune.adapters.generation import TextGenerator

    generator = TextGenerator(
        options.model,
        options.adapter,
        dtype=options.dtype,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    print_notes(generator.notes)
    if prompt is not None:
        _answer(generator, prompt, sampling, options)
    else:
        _converse(generator, sampling, options)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser("generate", "Stream text from a model, with or without an adapter.")
    add_base_options(parser, adapter_required=False, device="auto")
    add = parser.add_argument
    prompt = "what to answer; - reads it from stdin; without it, prompts are asked for one by one"
    add("--prompt", help=prompt)
    add("--system", help="instruction that precedes the prompt in a chat")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--without-adapter", action="store_true", help="answer as the base does")
    compare = "answer twice, first without the adapter"
    which.add_argument("--compare", action="store_true", help=compare)
    no_chat = "continue the prompt as it is, without chat template"
    add("--no-chat", action="store_true", help=no_chat)
    add("--max-new-tokens", type=int, default=256, help="most tokens (default: %(default)s)")
    temperature = "0 takes the likeliest token (the default); above it, tokens are sampled"
    add("--temperature", type=float, default=0.0, help=temperature)
    top_p = "sample from the likeliest tokens up to this probability (default: %(default)s)"
    add("--top-p", type=float, default=1.0, help=top_p)
    add("--seed", type=int, default=0, help="seed for sampling (default: 0)")
    dtype = "number type of the base (default: its own)"
    add("--dtype", type=full_name, choices=DTYPES, default="auto", help=dtype)
    options = parser.parse_args(argv)
    if options.compare and options.adapter is None:
        parser.error("--compare needs --adapter")
    if options.model is None and options.adapter is None:
        parser.error("give --model, --adapter or both")
    return options


def _read_prompt(prompt: str | None) -> str | None:
    if prompt == "-":
        return sys.stdin.read()
    if prompt is None and not sys.stdin.isatty():
        raise ValueError("--prompt is missing; give a text, or - to read it from stdin.")
    return prompt


def _converse(generator: "TextGenerator", sampling: Sampling, options: argparse.Namespace) -> None:
    print("Each line is answered on its own. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt.strip():
            continue
        try:
            _answer(generator, prompt, sampling, options)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"pacatune: error: {error}", file=sys.stderr)


def _answer(
    generator: "TextGenerator", prompt: str, sampling: Sampling, options: argparse.Namespace
) -> None:
    tokens = generator.encode(prompt, system=options.system, chat=not options.no_chat)
    runs = [("", not options.without_adapter)]
    if options.compare:
        runs = [("base:\n", False), ("\nwith the adapter:\n", True)]
    for heading, with_adapter in runs:
        print(heading, end="")
        generator.generate(tokens, sampling, with_adapter=with_adapter, on_text=_print_text)
        print()


def _print_text(text: str) -> None:
    if sys.stdout.isatty():
        # A model can write escape sequences; a terminal would obey them.
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    print(text, end="", flush=True)
