"""Turn an example into token ids and labels: which tokens are learned, and why not others."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pacatune.data.formats import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(slots=True)
class Encoded:
    """Token ids of one example, and what became of its loss."""

    input_ids: list[int]
    learned: list[bool]
    boundary_moved: bool = False
    """The prompt alone is tokenized otherwise than in front of its completion."""

    def labels(self, max_length: int | None) -> list[int]:
        """Return the ids to learn, -100 elsewhere, cut to `max_length`."""
        pairs = zip(self.input_ids[:max_length], self.learned, strict=False)
        return [token if learned else IGNORED for token, learned in pairs]


@dataclass(slots=True)
class Encoder:
    """Encodes examples with one tokenizer and one chat template.

    Args:
        tokenizer: Its `chat_template` renders chats.
        stop_ids: Tokens that end a generation.
        learn_all: Learn every token, not only completions.
        special_tokens: Whether plain texts get the tokenizer's own tokens and an EOS.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: Collection[int]
    learn_all: bool = False
    special_tokens: bool = True
    _marked_template: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._marked_template = _find_marked_template(self.tokenizer)

    def __call__(self, example: Example) -> Encoded:
        """Encode one example.

        Raises:
            ValueError: If the chat template cannot render it, or not turn by turn.
        """
        if isinstance(example.completion, str):
            assert isinstance(example.prompt, str)
            encoded = self._encode_text(example.prompt, example.completion)
        else:
            encoded = self._encode_chat(example)
        if self.learn_all:
            encoded.learned = [True] * len(encoded.input_ids)
        return encoded

    def _encode_text(self, prompt: str, completion: str) -> Encoded:
        end = self.tokenizer.eos_token or ""
        text = prompt + completion
        if not self.special_tokens:
            return self._encode_bare(prompt, text)
        ids = self.tokenizer(text if end and text.endswith(end) else text + end)["input_ids"]
        if len(ids) > 1 and ids[-1] == ids[-2] == self.tokenizer.eos_token_id:
            del ids[-1]  # The tokenizer adds one of its own.
        if not prompt:
            return Encoded(ids, [True] * len(ids))
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        if prompt_ids[-1:] == [self.tokenizer.eos_token_id] and not prompt.endswith(end):
            del prompt_ids[-1]
        start = common_prefix(prompt_ids, ids)
        learned = [position >= start for position in range(len(ids))]
        return Encoded(ids, learned, boundary_moved=start < len(prompt_ids))

    def _encode_bare(self, prompt: str, text: str) -> Encoded:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        start = common_prefix(prompt_ids, ids)
        learned = [position >= start for position in range(len(ids))]
        return Encoded(ids, learned, boundary_moved=start < len(prompt_ids))

    def _encode_chat(self, example: Example) -> Encoded:
        assert isinstance(example.prompt, list)
        assert isinstance(example.completion, list)
        messages = example.prompt + example.completion
        render = functools.partial(_render, self.tokenizer, example)
        if self._marked_template is not None:
            marked = render(messages, chat_template=self._marked_template, marked=True)
            learned = [bool(bit) for bit in marked["assistant_masks"]]
            if example.prompt:
                prompt_ids = render(example.prompt, chat_template=self._marked_template)[
                    "input_ids"
                ]
                start = common_prefix(prompt_ids, marked["input_ids"])
                learned[:start] = [False] * start
            return Encoded(marked["input_ids"], learned)
        ids = render(messages)["input_ids"]
        encoded = Encoded(ids, [False] * len(ids))
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" and turn >= len(example.prompt):
                self._learn_turn(encoded, example, messages, turn)
        return encoded

    def _learn_turn(
        self, encoded: Encoded, example: Example, messages: list[Message], turn: int
    ) -> None:
        """Mark what the model itself writes in one turn: from its cue to its stop token."""
        if turn == 0:
            raise ValueError(
                f"{example.place}: the chat opens with an assistant turn, which answers nothing; "
                "put a user or system turn before it, or give `data.chat_template` with "
                "{% generation %} marks."
            )
        ids = encoded.input_ids
        render = functools.partial(_render, self.tokenizer, example)
        before = render(messages[:turn])["input_ids"]
        cue = render(messages[:turn], cue=True)["input_ids"]
        after = ids if turn == len(messages) - 1 else render(messages[: turn + 1])["input_ids"]
        # The last token may merge with what follows; any more, and the template rewrites history.
        if (
            common_prefix(before, ids) < len(before) - 1
            or common_prefix(after, ids) < len(after) - 1
        ):
            raise ValueError(
                f"{example.place}: the chat template renders turn {turn + 1} otherwise when more "
                "turns follow, so its tokens cannot be told apart; give `data.chat_template` with "
                "{% generation %} marks, or train on single answers (prompt-completion)."
            )
        start, end = common_prefix(cue, ids), common_prefix(after, ids)
        stops = [i for i in range(start, end) if ids[i] in self.stop_ids]
        if stops and not self.tokenizer.decode(ids[stops[-1] + 1 : end]).strip():
            end = stops[-1] + 1  # Generation ends here: the line break behind it is never written.
        encoded.learned[start:end] = [True] * (end - start)
        encoded.boundary_moved |= start < len(cue)


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    length = 0
    for token, other in zip(ids, others, strict=False):
        if token != other:
            break
        length += 1
    return length


def _find_marked_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a template with {% generation %} marks: the model's, or TRL's of a known model."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        return None
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except Exception:
        # TRL probes unknown templates with made-up chats, on which they may fail in any way.
        return None
    return template


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    example: Example,
    messages: list[Message],
    *,
    cue: bool = False,
    marked: bool = False,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Render messages to token ids; with `cue`, up to where the assistant starts to write."""
    from jinja2 import TemplateError

    try:
        return dict(
            tokenizer.apply_chat_template(
                messages,
                tools=example.tools,
                chat_template=chat_template,
                add_generation_prompt=cue,
                return_dict=True,
                return_assistant_tokens_mask=marked,
            )
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{example.place}: the chat template cannot render it ({error}); "
            "change the messages, or give another `data.chat_template`."
        ) from error
