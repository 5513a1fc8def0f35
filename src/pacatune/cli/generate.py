"""`pacatune generate`: stream text from a model, with or without an adapter."""

import sys
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pacatune.adapters.sampling import Sampling
from pacatune.cli.options import ModelOptions, give_one, print_notes, quiet_libraries
from pacatune.precision import Dtype

if TYPE_CHECKING:
    from pacatune.adapters.generation import TextGenerator


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling, ModelOptions):
    """Stream text from a model, with or without an adapter."""

    prompt: str | None = None
    """What to answer; - reads it from stdin; without it, prompts are asked for one by one."""
    system: str | None = None
    """Instruction that precedes the prompt in a chat."""
    without_adapter: bool = False
    """Answer as the base does."""
    compare: bool = False
    """Answer twice, first without the adapter."""
    no_chat: bool = False
    """Continue the prompt as it is, without chat template."""
    dtype: Dtype = "auto"
    """Number type of the base; auto is its own."""

    def run(self, command: str) -> int:
        """Do it."""
        give_one(without_adapter=self.without_adapter, compare=self.compare)
        if self.compare and self.adapter is None:
            raise ValueError("--compare needs --adapter.")
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, --adapter or both; see `pacatune generate --help`.")
        self.check_base()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        if prompt is None and not sys.stdin.isatty():
            raise ValueError("--prompt is missing; give a text, or - to read it from stdin.")
        quiet_libraries()

        from pacatune.adapters.generation import TextGenerator

        how = self.values("dtype", "device", "allow_other_base")
        generator = TextGenerator(self.model, self.adapter, **how)
        print_notes(generator.notes)
        if prompt is not None:
            _answer(generator, prompt, self)
        else:
            _converse(generator, self)
        return 0


command = Generate


def _converse(generator: "TextGenerator", options: Generate) -> None:
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
            _answer(generator, prompt, options)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"pacatune: error: {error}", file=sys.stderr)


def _answer(generator: "TextGenerator", prompt: str, options: Generate) -> None:
    tokens = generator.encode(prompt, system=options.system, chat=not options.no_chat)
    runs = [("", not options.without_adapter)]
    if options.compare:
        runs = [("base:\n", False), ("\nwith the adapter:\n", True)]
    for heading, with_adapter in runs:
        print(heading, end="")
        generator.generate(tokens, options, with_adapter=with_adapter, on_text=_print_text)
        print()


def _print_text(text: str) -> None:
    if sys.stdout.isatty():
        # A model can write escape sequences; a terminal would obey them.
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    print(text, end="", flush=True)
