"""`pacatune generate`: stream text from a model, with or without an adapter."""

import sys
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pacatune.cli.options import ModelOptions, print_notes, quiet_libraries
from pacatune.precision import Dtype

if TYPE_CHECKING:
    from torch import Tensor

    from pacatune.adapters.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Stream text from a model, with or without an adapter."""

    prompt: str
    """What to answer; - reads it from stdin."""
    system: str | None = None
    """Instruction that precedes the prompt in a chat."""
    compare: bool = False
    """Answer twice, first without the adapter."""
    no_chat: bool = False
    """Continue the prompt as it is, without chat template."""
    dtype: Dtype = "auto"
    """Number type of the base; auto is its own."""
    packed: bool = False
    """Keep the matrices of a GGUF file, or of a folder in FP8 or INT4, as they are there: less
    memory, and more time for each token."""
    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values sample, 1 from the model's own distribution."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed for sampling."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` ({self.max_new_tokens}) must be at least 1; raise it."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` ({self.temperature}) must be 0 (greedy) or a positive number."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` ({self.top_p}) must be in (0, 1]; 1 keeps every token.")
        if self.seed < 0:
            raise ValueError(f"`seed` ({self.seed}) must be at least 0.")

    def run(self) -> int:
        """Do it."""
        if self.compare and self.adapter is None:
            raise ValueError("--compare needs --adapter.")
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, --adapter or both; see `pacatune generate --help`.")
        self.check_base()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        quiet_libraries()

        from pacatune.adapters.loading import load_language_model

        how = self.values("dtype", "device", "allow_other_base", "packed")
        loaded = load_language_model(self.model, self.adapter, **how)
        print_notes(loaded.notes)
        _answer(loaded, prompt, self)
        return 0


command = Generate


def _answer(loaded: "LoadedModel", prompt: str, options: Generate) -> None:
    import torch
    from peft import PeftModel
    from transformers import TextStreamer

    model: Any = loaded.model
    tokens = _encode(loaded.tokenizer, prompt, options).to(model.device)
    settings = _settings(loaded, tokens.shape[1], options)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: _print_text(text)
    runs = [("", True)]
    if options.compare:
        runs = [("base:\n", False), ("\nwith the adapter:\n", True)]
    for heading, with_adapter in runs:
        print(heading, end="")
        is_off = isinstance(model, PeftModel) and not with_adapter
        torch.manual_seed(options.seed)
        with model.disable_adapter() if is_off else nullcontext():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=streamer,
                **settings,
            )
        print()


def _encode(tokenizer: Any, prompt: str, options: Generate) -> "Tensor":
    """Return the tokens (1, T) of a prompt, as a conversation if there is a template for that."""
    if not prompt.strip():
        raise ValueError("`prompt` is empty; write at least one word.")
    system = options.system
    if tokenizer.chat_template is not None and not options.no_chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        encoded = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    elif system is None:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        raise ValueError(
            f"`system` ({system[:40]!r}) needs a chat template, which this tokenizer lacks "
            "or --no_chat turns off; put it into the prompt."
        )
    return cast("Tensor", encoded["input_ids"])


def _settings(loaded: "LoadedModel", num_tokens: int, options: Generate) -> dict[str, Any]:
    """Return what `generate` of transformers is told; refuse more than the context holds."""
    model, tokenizer = loaded.model, loaded.tokenizer
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and num_tokens + options.max_new_tokens > context:
        raise ValueError(
            f"the prompt ({num_tokens} tokens) and `max_new_tokens` ({options.max_new_tokens}) "
            f"exceed the model's context of {context}; shorten one of them."
        )
    # A run may have trained with another tokenizer's end of an answer than the base's.
    stop = model.generation_config.eos_token_id
    stops = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    is_sampled = options.temperature > 0
    return {
        "max_new_tokens": options.max_new_tokens,
        "eos_token_id": sorted(stops) or None,
        # One sequence is never padded; without a number, transformers warns that it chose one.
        "pad_token_id": min(stops, default=0) if pad is None else pad,
        # All are said, or what a base's generation_config.json asks for would be done.
        "do_sample": is_sampled,
        "temperature": options.temperature if is_sampled else None,
        "top_p": options.top_p if is_sampled else None,
        "top_k": 0 if is_sampled else None,
    }


def _print_text(text: str) -> None:
    if sys.stdout.isatty():
        # A model can write escape sequences; a terminal would obey them.
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    print(text, end="", flush=True)
