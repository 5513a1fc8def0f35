"""Stream text from a model, with and without its adapter, for one prompt or for several at once.

Each prompt has its own temperature and its own seed. A row's choice depends on its own logits and
its own generator only, so the other rows of a batch change it by no more than rounding does.
Sampling adds Gumbel noise to the scaled logits and takes the largest, which draws from their
softmax.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TextStreamer, TopPLogitsWarper

from pacatune.adapters.base import DTypeName
from pacatune.adapters.loading import load_language_model
from pacatune.adapters.sampling import Sampling
from pacatune.residency import resident


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One answer of a batch."""

    text: str
    num_tokens: int
    """Without the token that ends it."""
    finish_reason: Literal["stop", "length"]
    """`length`: the answer is as long as it may be, so it may have been cut off."""


class _SeededChoice(LogitsProcessor):
    """Turns the largest score into a sample, in the rows that have a temperature."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._rows = [
            # On the CPU, so that a seed means the same on every device.
            (row, sampling, torch.Generator().manual_seed(sampling.seed))
            for row, sampling in enumerate(samplings)
            if sampling.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) whose largest is the token to take."""
        scores = scores.float().clone()
        for row, sampling, generator in self._rows:
            scaled = scores[row : row + 1] / sampling.temperature
            if sampling.top_p < 1:
                scaled = cast(Tensor, TopPLogitsWarper(sampling.top_p)(input_ids, scaled))
            noise = torch.empty(scaled.shape[1], device="cpu").exponential_(generator=generator)
            scores[row] = scaled[0] - noise.log().to(scaled.device)
        return scores


class TextGenerator:
    """A model with its tokenizer, and its adapter if it has one.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of a PaCA or LoRA adapter; None goes without.
        dtype: Dtype of the base's weights; `auto` is the one it was saved in.
        device: Such as `cpu` or `cuda`; `auto` takes the accelerator if there is one.
        allow_other_base: As for `check_base`.
        quantization: Hold the base in 4 or 8 bits, which bitsandbytes does while it loads; None
            does so only if the adapter was trained on such a base.
        chat_template: Jinja text that writes conversations, instead of the tokenizer's own.

    Attributes:
        name: Name of the base.
        notes: What the user should know about base and adapter.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        ValueError: If the adapter is damaged or belongs to another base, the base has no
            tokenizer, or it cannot be quantised as asked.
    """

    def __init__(
        self,
        model: str | None,
        adapter: str | Path | None = None,
        *,
        dtype: DTypeName = "auto",
        device: str = "cpu",
        allow_other_base: bool = False,
        quantization: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        loaded = load_language_model(
            model,
            adapter,
            dtype=dtype,
            device=device,
            quantization=quantization,
            allow_other_base=allow_other_base,
        )
        self.name = loaded.name
        self.notes = loaded.notes
        self._tokenizer = loaded.tokenizer
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._model = loaded.model

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer knows how to write a conversation."""
        return self._tokenizer.chat_template is not None

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None where the model does not say."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: str, *, system: str | None = None, chat: bool = True) -> Tensor:
        """Return the tokens (1, T) of a prompt.

        Args:
            prompt: What the user says.
            system: Instruction before it; needs a chat template.
            chat: Write it as a conversation if the tokenizer has a template for that.

        Raises:
            ValueError: If there is nothing to read, or `system` has no place.
        """
        if not prompt.strip():
            raise ValueError("`prompt` is empty; write at least one word.")
        if chat and self.has_chat_template:
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self.encode_chat([*messages, {"role": "user", "content": prompt}])
        if system is not None:
            raise ValueError(
                f"`system` ({system[:40]!r}) needs a chat template, which this tokenizer lacks "
                "or --no_chat turns off; put it into the prompt."
            )
        return self._tokenizer(prompt, return_tensors="pt")["input_ids"]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """Return the tokens (1, T) of a conversation, up to where the next answer begins.

        Args:
            messages: Each with `role` and `content`.

        Raises:
            ValueError: If the tokenizer has no chat template.
        """
        if not self.has_chat_template:
            raise ValueError(
                f"the tokenizer of {self.name!r} has no chat template, so it cannot write a "
                "conversation; give its Jinja text in a file: --chat-template FILE."
            )
        encoded: Any = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens: Tensor = encoded["input_ids"]
        return tokens

    def generate(
        self,
        tokens: Tensor,
        sampling: Sampling,
        *,
        with_adapter: bool = True,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Generate an answer, handing out its text as it comes.

        Args:
            tokens: (1, T) from `encode`.
            sampling: How to choose; the global random state is left as it was.
            with_adapter: False goes without the adapter, as the base would answer.
            on_text: Called with each new piece of text.

        Returns:
            The whole answer.

        Raises:
            ValueError: If prompt and answer are longer than the model's context.
        """
        streamer = None if on_text is None else _CallbackStreamer(self._tokenizer, on_text)
        is_switched = isinstance(self._model, PeftModel) and not with_adapter
        with self._model.disable_adapter() if is_switched else nullcontext():
            (answer,) = self.generate_batch([tokens], [sampling], streamer=streamer)
        return answer.text

    def generate_batch(
        self,
        prompts: Sequence[Tensor],
        samplings: Sequence[Sampling],
        *,
        streamer: TextStreamer | None = None,
    ) -> list[Generated]:
        """Generate an answer to each prompt, all at once.

        Args:
            prompts: (1, T) each, from `encode` or `encode_chat`, of any lengths.
            samplings: How to choose, one for each; with one `max_new_tokens`.
            streamer: Is given the tokens of a single prompt as they come.

        Raises:
            ValueError: If `max_new_tokens` differs, or prompt and answer are longer than the
                model's context.
        """
        lengths = {one.max_new_tokens for one in samplings}
        if len(lengths) != 1 or len(prompts) != len(samplings):
            raise ValueError(
                f"`samplings` ({len(samplings)}, with `max_new_tokens` {sorted(lengths)}) must be "
                f"one for each of {len(prompts)} prompts and have one length; make several "
                "batches."
            )
        (max_new_tokens,) = lengths
        longest = max(prompt.shape[1] for prompt in prompts)
        context = self.context_length
        if context is not None and longest + max_new_tokens > context:
            raise ValueError(
                f"the prompt ({longest} tokens) and `max_new_tokens` ({max_new_tokens}) exceed the "
                f"model's context of {context}; shorten one of them."
            )
        stops = self._stop_tokens()
        rows = [prompt[0] for prompt in prompts]
        left: Any = {"batch_first": True, "padding_side": "left"}
        tokens = pad_sequence(rows, padding_value=stops["pad_token_id"], **left)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **left)
        with torch.no_grad(), resident(self._model):
            output = self._model.generate(
                input_ids=tokens.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                logits_processor=[_SeededChoice(samplings)],
                # A base's generation_config.json may ask for sampling.
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                **stops,
            )
        return [self._cut(answer, stops) for answer in output[:, longest:].tolist()]

    def _cut(self, answer: list[int], stops: dict[str, Any]) -> Generated:
        ends = stops["eos_token_id"] or []
        end = next((place for place, token in enumerate(answer) if token in ends), None)
        return Generated(
            text=cast(str, self._tokenizer.decode(answer[:end], skip_special_tokens=True)),
            num_tokens=len(answer[:end]),
            finish_reason="length" if end is None else "stop",
        )

    def _stop_tokens(self) -> dict[str, Any]:
        stop = self._model.generation_config.eos_token_id
        ids = set(stop if isinstance(stop, list) else [stop]) | {self._tokenizer.eos_token_id}
        ids.discard(None)
        pad = self._tokenizer.pad_token_id
        # One sequence is never padded; without a number, transformers warns that it chose one.
        return {
            "eos_token_id": sorted(ids) or None,
            "pad_token_id": min(ids, default=0) if pad is None else pad,
        }


class _CallbackStreamer(TextStreamer):
    """Hands decoded text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the next piece from transformers."""
        self._on_text(text)
