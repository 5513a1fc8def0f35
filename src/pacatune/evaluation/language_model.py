"""A model in memory as lm-eval asks it. Imports lm-eval, which is optional."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from pacatune.evaluation.harness import quiet_lm_eval
from pacatune.evaluation.scoring import batches, last_logits


class LanguageModel(HFLM):  # type: ignore[misc]  # lm-eval is not followed
    """lm-eval's Hugging Face model around one that is loaded already, adapters included.

    With `keep_line_break`, a line break that ends a context stays there. lm-eval scores it with
    the continuation, which shifts likelihoods per character where a chat template ends its cue
    with one.
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
        with quiet_lm_eval(), _left_untied(model):
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        self.num_truncated = 0  # prompts so far that did not fit the model's context
        self._num_kept = 0
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

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        """Score batch by batch, so that a model computes only logits that are read."""
        self._check(requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            # lm-eval runs requests that differ only in their last token as one.
            groups.setdefault((*context, *continuation[:-1]), []).append(place)
        longest_first = sorted(groups, key=len, reverse=True)
        size = override_bs or self.batch_size
        answers: list[Any] = [None] * len(requests)
        for keys in batches(longest_first, size, "scoring" if self._progress else None):
            places = [place for key in keys for place in groups[key]]
            batch = [requests[place] for place in places]
            self._num_kept = self._tail(batch)
            found = super()._loglikelihood_tokens(batch, disable_tqdm=True)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        self._num_kept = 0
        return answers

    def _check(self, requests: Any) -> None:
        """Count the prompts that are cut at their start; refuse answers that would be cut."""
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

    def _tail(self, requests: Any) -> int:
        """Return how many of a padded batch's last positions are read."""
        room: int = self.max_length
        ends = [(min(len(start) + len(end) - 1, room), len(end)) for _, start, end in requests]
        return max(length for length, _ in ends) - min(length - scored for length, scored in ends)

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        if not self._num_kept:
            return super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        # lm-eval counts positions from the end of what it gets.
        return last_logits(self.model, self._num_kept, input_ids=inps)


@contextmanager
def _left_untied(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights again: an adapter on one of two tied layers unties them."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
