"""Turn an example into token ids and labels: which tokens are learned, and why not others."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pacatune.data.formats import Example, Message
from pacatune.data.shown import check_shown, with_arguments

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
    hidden: list[str] = field(default_factory=list)
    """Fields of messages that the chat template does not show."""

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
            ValueError: If the chat template cannot render it, not turn by turn, or leaves out
                what is read or learned.
        """
        if isinstance(example.completion, str):
            assert isinstance(example.prompt, str)
            encoded = self._encode_text(example.prompt, example.completion)
        else:
            example, hidden = self._check(example)
            encoded = self._encode_chat(example)
            encoded.hidden = hidden
        if self.learn_all:
            encoded.learned = [True] * len(encoded.input_ids)
        return encoded

    def _check(self, example: Example) -> tuple[Example, list[str]]:
        """Return the chat as its template takes it, and the fields that are not shown."""
        if self.learn_all and example.skipped:
            raise ValueError(
                f"{example.place}: turn {example.skipped[0] + 1} has weight 0, and `data.loss` "
                "'all' learns every turn; use 'completion', or remove the weights."
            )
        turns = range(len(example.messages)) if self.learn_all else example.learned_turns
        render = functools.partial(
            _render_text, self.tokenizer, example.place, self._marked_template
        )
        objects, texts = (with_arguments(example, as_text=as_text) for as_text in (False, True))
        try:
            return objects, check_shown(objects, turns, render)
        except ValueError:
            if objects == texts:
                raise
            with contextlib.suppress(ValueError):
                return texts, check_shown(texts, turns, render)
            raise

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
        render = functools.partial(_render, self.tokenizer, example)
        messages, template = example.messages, self._marked_template
        if template is None:
            ids = render(messages)["input_ids"]
            encoded = Encoded(ids, [False] * len(ids))
            for turn in example.learned_turns:
                self._learn_turn(encoded, example, turn)
            return encoded
        marked = render(messages, chat_template=template, marked=True)
        encoded = Encoded(marked["input_ids"], [bool(bit) for bit in marked["assistant_masks"]])
        if example.prompt:
            prompt_ids = render(messages[: len(example.prompt)], chat_template=template)[
                "input_ids"
            ]
            start = common_prefix(prompt_ids, encoded.input_ids)
            encoded.learned[:start] = [False] * start
        for turn in example.skipped:
            if turn >= len(example.prompt) and messages[turn]["role"] == "assistant":
                start, end = self._find_turn(encoded.input_ids, example, turn)
                encoded.learned[start:end] = [False] * (end - start)
        return encoded

    def _learn_turn(self, encoded: Encoded, example: Example, turn: int) -> None:
        """Mark what the model itself writes in one turn: from its cue to its stop token."""
        if turn == 0:
            raise ValueError(
                f"{example.place}: the chat opens with an assistant turn, which answers nothing; "
                "put a user or system turn before it, or give `data.chat_template` with "
                "{% generation %} marks."
            )
        ids = encoded.input_ids
        cue = _render(self.tokenizer, example, example.messages[:turn], cue=True)["input_ids"]
        _, end = self._find_turn(ids, example, turn)
        start = common_prefix(cue, ids)
        stops = [i for i in range(start, end) if ids[i] in self.stop_ids]
        if stops and not self.tokenizer.decode(ids[stops[-1] + 1 : end]).strip():
            end = stops[-1] + 1  # Generation ends here: the line break behind it is never written.
        encoded.learned[start:end] = [True] * (end - start)
        encoded.boundary_moved |= start < len(cue)

    def _find_turn(self, ids: list[int], example: Example, turn: int) -> tuple[int, int]:
        """Return where the tokens of one turn begin and end."""
        messages = example.messages
        render = functools.partial(
            _render, self.tokenizer, example, chat_template=self._marked_template
        )
        before = render(messages[:turn])["input_ids"] if turn else []
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
        return common_prefix(before, ids), common_prefix(after, ids)


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
    with _template_errors(example.place):
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


def _render_text(
    tokenizer: "PreTrainedTokenizerBase",
    place: str,
    chat_template: str | None,
    messages: list[Message],
    tools: list[Any] | None,
) -> str:
    """Render messages to text."""
    with _template_errors(place):
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=chat_template, tokenize=False
            )
        )


@contextlib.contextmanager
def _template_errors(place: str) -> Iterator[None]:
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{place}: the chat template cannot render it ({error}); "
            "change the messages, or give another `data.chat_template`."
        ) from error
