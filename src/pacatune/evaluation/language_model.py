"""A model in memory as lm-eval asks it. Imports lm-eval, which is optional."""

from typing import Any

from lm_eval.models.huggingface import HFLM

from pacatune.evaluation.harness import quiet_lm_eval


class LanguageModel(HFLM):  # type: ignore[misc]  # lm-eval is not followed
    """lm-eval's Hugging Face model around one that is loaded already, adapters included.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer; gets a padding token if it has none.
        batch_size: Prompts that are evaluated at once.
        progress: Whether to show lm-eval's bars.
        keep_line_break: Whether a line break that ends a context stays there. lm-eval scores it
            with the continuation, which shifts likelihoods per character where a chat template
            ends its cue with one.

    Attributes:
        num_truncated: Prompts so far that did not fit the model's context.

    Raises:
        ValueError: If `batch_size` is below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        progress: bool = False,
        keep_line_break: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` ({batch_size}) must be at least 1.")
        # Logits of a 16-bit model are rounded already; rounded logarithms would make more ties.
        with quiet_lm_eval():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        self.num_truncated = 0
        self._progress = progress
        self._keep_line_break = keep_line_break

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Score continuations of contexts."""
        return super().loglikelihood(requests, disable_tqdm=not self._progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Score whole texts."""
        return super().loglikelihood_rolling(requests, disable_tqdm=not self._progress)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Continue contexts."""
        return super().generate_until(requests, disable_tqdm=not self._progress)

    def _encode_pair(self, context: str, continuation: str) -> Any:
        if not (self._keep_line_break and context.endswith("\n")):
            return super()._encode_pair(context, continuation)
        context_ids = self.tok_encode(context)
        return context_ids, self.tok_encode(context + continuation)[len(context_ids) :]

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        room = self.max_length
        cut = set()
        for texts, context, continuation in requests:
            if len(continuation) > room:
                raise ValueError(
                    f"an answer has {len(continuation)} tokens, more than the model's context of "
                    f"{room}; shorten it or use another model."
                )
            if len(context) + len(continuation) > room + 1:
                cut.add(texts[0] if texts else tuple(context))
        self.num_truncated += len(cut)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)
