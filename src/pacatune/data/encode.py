"""Turn an example into token ids and labels: which tokens are learned, and why not others."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from pacatune.data import chat_images
from pacatune.data.chat_images import ImageTokenizer
from pacatune.data.formats import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned."""

Render = Callable[[list[Message], list[Any] | None], str]

_NEEDED = ("content", "tool_calls")
# What an assistant writes besides: needed where it is to be learned, else the template's choice.
_WRITTEN = ("function_call", "reasoning_content", "reasoning", "thinking")
_BOOKKEEPING = ("role", "tool_call_id", "id")
_UNREAD = re.compile(rf'[\s\\"]+|{chat_images.IMAGE.pattern}')


@dataclass(frozen=True, slots=True)
class _Part:
    """A tool (turn None) or a field of a message, and the texts in it."""

    name: str
    turn: int | None
    texts: list[str]


def check_shown(example: Example, learned: Collection[int], render: Render) -> list[str]:
    """Check that a template shows everything of a chat that is read, and its `learned` turns.

    Most templates drop what they do not know without a word. So the chat is rendered a second time
    with a mark in place of each text, and no mark may be missing. Returns the names of fields that
    are not shown and need not be, as "name" or "rating".
    """
    text = _squeeze(render(example.messages, example.tools))
    for turn in learned:
        if _squeeze(example.messages[turn]["content"]) not in text:
            _refuse(example, f"all of the content of turn {turn + 1}")
    marks = (f"zq{number}qz" for number in itertools.count())
    messages, tools, parts = _mark_chat(example, lambda _: next(marks))
    try:
        text = _squeeze(render(messages, tools))
    except ValueError:  # The template asks for certain texts: look for those of the chat itself.
        parts = _mark_chat(example, lambda piece: piece)[2]
    hidden = set()
    for part in parts:
        missing = [piece for piece in part.texts if _squeeze(piece) not in text]
        if not missing:
            continue
        if part.turn is None:
            _refuse(example, part.name)
        if part.name in _NEEDED or (part.name in _WRITTEN and part.turn in learned):
            role = example.messages[part.turn]["role"]
            _refuse(example, f"{part.name} of turn {part.turn + 1} (role {role!r})")
        if part.name not in _WRITTEN and len(missing) == len(part.texts):
            hidden.add(part.name)
    return sorted(hidden)


def with_arguments(example: Example, *, as_text: bool) -> Example:
    """Return a chat whose tool calls all have their arguments as objects, or all as JSON.

    Most templates write JSON themselves and would write that of a text twice; some can only take
    a text. Arguments that are no JSON object stay as they are.
    """

    def convert(arguments: Any) -> Any:
        found = _parse(arguments)
        if not isinstance(found, dict):
            return arguments
        return json.dumps(found, ensure_ascii=False) if as_text else found

    def convert_all(messages: str | list[Message]) -> str | list[Message]:
        assert isinstance(messages, list)
        return [
            {**m, "tool_calls": [_map_function(c, {"arguments": convert}) for c in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]

    return replace(
        example, prompt=convert_all(example.prompt), completion=convert_all(example.completion)
    )


def _mark_chat(
    example: Example, stand_in: Callable[[str], str]
) -> tuple[list[Message], list[Any] | None, list[_Part]]:
    """Copy messages and tools with `stand_in` of each text, and list what has to be looked for."""
    parts: list[_Part] = []

    def mark(value: Any) -> Any:
        """Replace every text and number, and note what stands there now."""
        if isinstance(value, dict):
            return {key: mark(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [mark(inner) for inner in value]
        if value is None or isinstance(value, bool) or not str(value).strip():
            return value
        parts[-1].texts.append(stand_in(str(value)))
        return parts[-1].texts[-1]

    def mark_arguments(value: Any) -> Any:
        found = _parse(value)
        is_text = isinstance(value, str) and isinstance(found, dict)
        return json.dumps(mark(found)) if is_text else mark(value)

    messages = []
    for turn, message in enumerate(example.messages):
        copy = dict(message)
        for name, value in message.items():
            if name in _BOOKKEEPING or (name == "name" and message["role"] == "tool"):
                continue
            parts.append(_Part(name, turn, []))
            if name == "tool_calls":
                marks = {"name": mark, "arguments": mark_arguments}
                copy[name] = [_map_function(call, marks) for call in value]
            else:
                copy[name] = mark(value)
        messages.append(copy)
    tools = []
    for number, tool in enumerate(example.tools or ()):
        parts.append(_Part(f"tools[{number}]", None, []))
        tools.append(_map_function(tool, {"name": mark}))
    return messages, None if example.tools is None else tools, parts


def _map_function(
    holder: dict[str, Any], maps: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Copy a tool or call with some fields of its function mapped."""
    if isinstance(holder.get("function"), dict):
        return {**holder, "function": _map_function(holder["function"], maps)}
    return {key: maps[key](value) if key in maps else value for key, value in holder.items()}


def _parse(arguments: Any) -> Any:
    """Return what a JSON text says; anything else as it is."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _squeeze(text: str) -> str:
    """Drop what templates add and take away: white space, and the quoting of JSON."""
    return _UNREAD.sub("", text)


def _refuse(example: Example, what: str) -> NoReturn:
    raise ValueError(
        f"{example.place}: the chat template does not show {what}, so the model would learn the "
        "turns without it; give a `data.chat_template` that shows it, or take it out of the row."
    )


@dataclass(slots=True)
class Encoded:
    """Token ids of one example, and what became of its loss."""

    input_ids: list[int]
    learned: list[bool]
    boundary_moved: bool = False
    """The prompt alone is tokenized otherwise than in front of its completion."""
    hidden: list[str] = field(default_factory=list)
    """Fields of messages that the chat template does not show."""
    text: str = ""
    """A chat with images as its template writes it, each as one mark."""

    def labels(self, max_length: int | None) -> list[int]:
        """Return the ids to learn, -100 elsewhere, cut to `max_length`."""
        pairs = zip(self.input_ids[:max_length], self.learned, strict=False)
        return [token if learned else IGNORED for token, learned in pairs]


@dataclass(slots=True)
class Encoder:
    """Encodes examples with one tokenizer and its chat template."""

    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: Collection[int]
    """Tokens that end a generation."""
    learn_all: bool = False
    """Learn every token, not only completions."""
    special_tokens: bool = True
    """Whether plain texts get the tokenizer's own tokens and an EOS."""
    _marked_template: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._marked_template = _find_marked_template(self.tokenizer)

    def __call__(self, example: Example) -> Encoded:
        """Encode one example."""
        if isinstance(example.completion, str):
            assert isinstance(example.prompt, str)
            encoded = self._encode_text(example.prompt, example.completion)
        else:
            example, hidden = self._check(example)
            text = self._text(example) if isinstance(self.tokenizer, ImageTokenizer) else ""
            encoded = self._encode_chat(example)
            encoded.hidden, encoded.text = hidden, text
        if self.learn_all:
            encoded.learned = [True] * len(encoded.input_ids)
        return encoded

    def _text(self, example: Example) -> str:
        """Return the rendered chat, if it shows each of its images."""
        text = str(self._render(example.place, example.messages, example.tools, tokenize=False))
        mark = self.tokenizer.image_token
        if text.count(mark) != len(example.images):
            raise ValueError(
                f"{example.place}: the chat template shows {text.count(mark)} of "
                f"{len(example.images)} images ({mark}); give a `data.chat_template` that shows "
                "each of them, and texts without that mark."
            )
        return text

    def _check(self, example: Example) -> tuple[Example, list[str]]:
        """Return the chat as its template takes it, and the fields that are not shown."""
        if self.learn_all and example.skipped:
            raise ValueError(
                f"{example.place}: turn {example.skipped[0] + 1} has weight 0, and `data.loss` "
                "'all' learns every turn; use 'completion', or remove the weights."
            )
        turns = range(len(example.messages)) if self.learn_all else example.learned_turns

        def render(messages: list[Message], tools: list[Any] | None) -> str:
            return str(self._render(example.place, messages, tools, tokenize=False))

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
        def tokenize(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text, add_special_tokens=self.special_tokens)[
                "input_ids"
            ]
            return ids

        end = (self.tokenizer.eos_token or "") if self.special_tokens else ""
        text, eos = prompt + completion, self.tokenizer.eos_token_id
        ids = tokenize(text if text.endswith(end) else text + end)
        prompt_ids = tokenize(prompt) if prompt else []
        if self.special_tokens:  # The tokenizer may add an EOS of its own.
            if len(ids) > 1 and ids[-1] == ids[-2] == eos:
                del ids[-1]
            if prompt_ids[-1:] == [eos] and not prompt.endswith(end):
                del prompt_ids[-1]
        start = common_prefix(prompt_ids, ids)
        learned = [position >= start for position in range(len(ids))]
        return Encoded(ids, learned, boundary_moved=start < len(prompt_ids))

    def _encode_chat(self, example: Example) -> Encoded:
        messages = example.messages
        if self._marked_template is None:
            ids = self._ids(example, messages)
            encoded = Encoded(ids, [False] * len(ids))
            for turn in example.learned_turns:
                self._learn_turn(encoded, example, turn)
            return encoded
        marked = self._render(
            example.place,
            messages,
            example.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        encoded = Encoded(marked["input_ids"], [bool(bit) for bit in marked["assistant_masks"]])
        if example.prompt:
            prompt_ids = self._ids(example, messages[: len(example.prompt)])
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
        cue = self._ids(example, example.messages[:turn], add_generation_prompt=True)
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
        before = self._ids(example, messages[:turn]) if turn else []
        is_last = turn == len(messages) - 1
        after = ids if is_last else self._ids(example, messages[: turn + 1])
        # The last token may merge with what follows; any more, and the template rewrites history.
        start, end = common_prefix(before, ids), common_prefix(after, ids)
        if start < len(before) - 1 or end < len(after) - 1:
            raise ValueError(
                f"{example.place}: the chat template renders turn {turn + 1} otherwise when more "
                "turns follow, so its tokens cannot be told apart; give `data.chat_template` with "
                "{% generation %} marks, or train on single answers (prompt-completion)."
            )
        return start, end

    def _ids(self, example: Example, messages: list[Message], **options: Any) -> list[int]:
        rendered = self._render(example.place, messages, example.tools, return_dict=True, **options)
        return list(rendered["input_ids"])

    def _render(
        self, place: str, messages: list[Message], tools: list[Any] | None, **options: Any
    ) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._marked_template, **options
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"{place}: the chat template cannot render it ({error}); "
                "change the messages, or give another `data.chat_template`."
            ) from error


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
