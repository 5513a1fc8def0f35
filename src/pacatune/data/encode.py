"""Turn an example into token ids and labels: which tokens are learned, and why not others."""

import contextlib
import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pacatune.data.formats import IMAGE, Example, Message, as_parts, stored_image
from pacatune.data.read import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned."""

# What an assistant writes besides: needed where it is to be learned, else the template's choice.
_WRITTEN = ("reasoning_content", "reasoning", "thinking")
_CALLS = {"tool_calls", "function_call"}
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_DEFAULTS = re.compile(r"\A(?:\{% set (\w+) = \1 if \1 is defined else .+ %\}\n)*")
# What templates add and take away: white space, and the quoting of JSON.
_UNREAD = re.compile(r'[\s\\"]+')


class ImagesFound(ValueError):
    """Images where texts were expected."""


@dataclass(kw_only=True)
class Encoder:
    """Encodes examples with one tokenizer and its chat template."""

    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: Collection[int]
    """Tokens that end a generation."""
    max_length: int | None = None
    """Tokens that an example is cut to."""
    learn_all: bool = False
    """Learn every token, not only completions."""
    special_tokens: bool = True
    """Whether plain texts get the tokenizer's own tokens and an EOS."""
    processor: Any = None
    """What makes images into tensors, where chats have some."""

    def __post_init__(self) -> None:
        writer = self.processor or self.tokenizer
        self._marked_template = _find_marked_template(writer)
        self._template = str(writer.chat_template or "")
        self._cues: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is remembered: by the rest, datasets knows encoded data again."""
        return vars(self) | {"_cues": {}}

    def __call__(self, example: Example) -> dict[str, Any]:
        """Return the columns of one example: ids, labels, and `notes` of what looks wrong."""
        if example.images and (self.processor is None or self.learn_all):
            rule = "this task or `data.loss` 'all' is for texts"
            raise ImagesFound(f"{example.place}: has images: {rule}.")
        with named(example.place):
            return self._encode(example)

    def _encode(self, example: Example) -> dict[str, Any]:
        text, limit = "", self.max_length
        if isinstance(example.completion, str):
            ids, learned, moved = self._encode_text(example)
        else:
            example, text = self._check(example)
            ids, learned, moved = self._encode_chat(example)
        learned = [True] * len(ids) if self.learn_all else learned
        if (bos := self.tokenizer.bos_token_id) is not None and ids[:2] == [bos, bos]:
            rule = f"begins with {self.tokenizer.bos_token!r} twice, once from the tokenizer"
            raise ValueError(f"{rule}; remove it from data or template.")
        if not any(learned[1:]):  # The first token is never predicted.
            fix = "remove it, or mark the answer by {% generation %} in `data.chat_template`"
            raise ValueError(f"nothing to learn, no token is an answer's; {fix}.")
        notes = ["moved"] * moved
        if example.prompt and isinstance(example.prompt, str) and self._template:
            notes.append("plain")
        if not all(reads_variable(self._template, name) for name in example.variables):
            notes.append("unread")
        if not any(learned[1:limit]):
            notes.append("lost")
        elif limit is not None and len(ids) > limit:
            notes.append("cut")
        elif ids[max(i for i, flag in enumerate(learned) if flag)] not in self.stop_ids:
            notes.append("open")
        if example.images and {"lost", "cut"} & set(notes):
            rule = f"has images and {len(ids)} tokens, more than `training.max_length` ({limit})"
            raise ValueError(f"{rule}; images cannot be cut: raise it.")
        labels = [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]
        images = list(map(stored_image, example.images))
        return {
            "place": example.place,
            "input_ids": ids[:limit],
            "labels": labels[:limit],
            "num_tokens": len(ids),
            "notes": notes,
            **({} if self.processor is None else {"text": text, "images": images}),
        }

    def _encode_text(self, example: Example) -> tuple[list[int], list[bool], bool]:
        if self.processor is not None:
            rule = "is a plain text, and other rows have images; make it a chat"
            raise ValueError(f"{rule}, or train on one of them.")

        def tokenize(text: str) -> list[int]:
            encoding = self.tokenizer(text, add_special_tokens=self.special_tokens)
            return list(encoding["input_ids"])

        prompt, text = str(example.prompt), f"{example.prompt}{example.completion}"
        end = (self.tokenizer.eos_token or "") if self.special_tokens else ""
        eos = self.tokenizer.eos_token_id
        ids = tokenize(text if text.endswith(end) else text + end)
        prompt_ids = tokenize(prompt) if prompt else []
        if self.special_tokens:  # The tokenizer may add an EOS of its own.
            if len(ids) > 1 and ids[-1] == ids[-2] == eos:
                del ids[-1]
            if prompt_ids[-1:] == [eos] and not prompt.endswith(end):
                del prompt_ids[-1]
        start = common_prefix(prompt_ids, ids)
        return ids, [place >= start for place in range(len(ids))], start < len(prompt_ids)

    def _check(self, example: Example) -> tuple[Example, str]:
        """Return the chat as its template takes it, and the text."""
        if self.learn_all and example.skipped:
            raise ValueError("has turns of weight 0, and `data.loss` 'all' learns all; drop one.")
        for tool in example.tools or ():
            _function(tool)
        example = _with_arguments(example)
        return example, self._shown(example)

    def _shown(self, example: Example) -> str:
        """Return the text of a chat, if its template shows what is read of it.

        Most templates drop what they do not know without a word. What is learned must be there as
        it is; of tools, calls and other turns, a part: with others, the text would be another.
        """
        text = str(self._render(example, example.messages, tokenize=False))
        missing, squeezed = self._hidden_calls(example, text), _UNREAD.sub("", text)
        turns = range(len(example.messages)) if self.learn_all else example.learned_turns
        for turn, message in enumerate(example.messages):
            where = f"of turn {turn + 1} (role {message['role']!r})"
            needed = dict.fromkeys(IMAGE.split(message["content"])[::2], f"content {where}")
            if turn in turns:
                needed |= {message.get(name, ""): f"{name} {where}" for name in _WRITTEN}
            lost = [w for piece, w in needed.items() if _UNREAD.sub("", piece) not in squeezed]
            if turn not in turns and (lost or message["role"] not in ("user", "assistant")):
                others = [*example.messages]
                others[turn] = {**message, "content": "zqz"}
                is_lost = message["content"] and self._has_text(text, example, others)
                lost = [f"content {where}"] if is_lost else []
            missing += lost
        num_images = len(example.images)
        if self.processor is not None and text.count(self.processor.image_token) != num_images:
            missing.append(f"each of {num_images} images once")
        if missing:
            raise ValueError(
                f"the chat template does not show {missing[0]}, so the model would learn the turns "
                "without it; give a `data.chat_template` that shows it, or take it out of the row."
            )
        return text

    def _hidden_calls(self, example: Example, text: str) -> list[str]:
        """Return what of tools and calls is not in the text of a chat."""
        messages, hidden = example.messages, []
        if example.tools and self._has_text(text, replace(example, tools=None), messages):
            hidden.append("tools")
        bare = [{k: m[k] for k in m.keys() - _CALLS} for m in messages]
        if bare != messages and self._has_text(text, example, bare):
            hidden.append("tool_calls")
        idle = _without_arguments(messages)
        if idle != messages and self._has_text(text, example, idle):
            hidden.append("the arguments of tool_calls")
        return hidden

    def _has_text(self, text: str, example: Example, messages: list[Message]) -> bool:
        """Whether a chat of these messages, if its template takes them, has this text."""
        with contextlib.suppress(ValueError):
            return bool(self._render(example, messages, tokenize=False) == text)
        return False

    def _encode_chat(self, example: Example) -> tuple[list[int], list[bool], bool]:
        messages, moved = example.messages, False
        if self._marked_template is None:
            ids = self._ids(example, messages)
            learned = [False] * len(ids)
            for turn in example.learned_turns:
                start, end, cue_length = self._learned_span(ids, example, turn)
                learned[start:end] = [True] * (end - start)
                moved |= start < cue_length
            return ids, learned, moved
        marked = self._render(example, messages, return_assistant_tokens_mask=True)
        ids = list(marked["input_ids"])
        learned = [bool(bit) for bit in marked["assistant_masks"]]
        self._unlearn_frames(ids, learned, self._cue(example.variables))
        if example.prompt:
            start = common_prefix(self._ids(example, messages[: len(example.prompt)]), ids)
            learned[:start] = [False] * start
        for turn in example.skipped:
            if turn >= len(example.prompt) and messages[turn]["role"] == "assistant":
                start, end = self._find_turn(ids, example, turn)
                learned[start:end] = [False] * (end - start)
        return ids, learned, moved

    def _unlearn_frames(self, ids: list[int], learned: list[bool], cue: list[int]) -> None:
        """Take out what marks cover and the model does not write when it answers.

        That is the end of the generation prompt, a line break behind the token that ends an answer,
        and the empty thoughts that a template adds to earlier answers.
        """
        runs = groupby(range(len(ids)), learned.__getitem__)
        answers = [[*places] for is_learned, places in runs if is_learned]
        for number, places in enumerate(answers):
            start, end = places[0], places[-1] + 1
            first = self._end_of_cue(ids, start, cue)
            last = self._end_of_answer(ids, first, end)
            if number < len(answers) - 1:
                first = max(first, self._end_of_thought(ids, start, last))
            learned[start:end] = [first <= place < last for place in places]

    def _end_of_cue(self, ids: list[int], start: int, cue: list[int]) -> int:
        """Return where the generation prompt ends that a learned turn begins in."""
        for begin in range(max(0, start - len(cue) + 1), start + 1):
            if cue and ids[begin : begin + len(cue)] == cue:
                return begin + len(cue)
        return start

    def _cue(self, variables: dict[str, Any]) -> list[int]:
        """Return the tokens that a generation prompt adds to a chat."""
        key = repr(variables)
        if key not in self._cues:
            self._cues[key] = []
            question = Example("", [], [{"role": "user", "content": "?"}], variables=variables)
            with contextlib.suppress(ValueError):  # a template may ask for more
                plain = self._ids(question, question.messages)
                cued = self._ids(question, question.messages, add_generation_prompt=True)
                if cued[: len(plain)] == plain:
                    self._cues[key] = cued[len(plain) :]
        return self._cues[key]

    def _end_of_answer(self, ids: list[int], start: int, end: int) -> int:
        """Return where a generation ends: a line break behind its last token is never written."""
        stops = [place for place in range(start, end) if ids[place] in self.stop_ids]
        if stops and not self._text(ids[stops[-1] + 1 : end]).strip():
            return stops[-1] + 1
        return end

    def _end_of_thought(self, ids: list[int], start: int, end: int) -> int:
        """Return where an answer begins behind an empty thought, `<think> </think>`, if any."""
        thought = _EMPTY_THOUGHT.match(self._text(ids[start:end]))
        if thought is None:
            return start
        return next(
            place
            for place in range(start + 1, end + 1)
            if len(self._text(ids[start:place])) >= thought.end()
        )

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _learned_span(self, ids: list[int], example: Example, turn: int) -> tuple[int, int, int]:
        """Return where what the model itself writes in a turn begins and ends, and its cue."""
        if turn == 0:
            rule = "the chat opens with an assistant turn, which answers nothing"
            raise ValueError(f"{rule}; put a user or system turn before it.")
        cue = self._ids(example, example.messages[:turn], add_generation_prompt=True)
        _, end = self._find_turn(ids, example, turn)
        start = common_prefix(cue, ids)
        return start, self._end_of_answer(ids, start, end), len(cue)

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
                f"the chat template renders turn {turn + 1} otherwise when more turns follow, so "
                "its tokens cannot be told apart; give `data.chat_template` with {% generation %} "
                "marks, or train on single answers (prompt-completion)."
            )
        return start, end

    def _ids(self, example: Example, messages: list[Message], **options: Any) -> list[int]:
        return list(self._render(example, messages, **options)["input_ids"])

    def _render(
        self, example: Example, messages: list[Message], *, tokenize: bool = True, **options: Any
    ) -> Any:
        """Return the text of a chat, or its tokens with as many for each image as it has."""
        options |= {"tools": example.tools, "chat_template": self._marked_template}
        options |= example.variables | {"tokenize": tokenize, "return_dict": tokenize}
        if self.processor is None:
            return apply_template(self.tokenizer, messages, **options)
        options["processor_kwargs"] = {"add_special_tokens": False}
        messages = [as_parts(message) for message in messages]
        rendered = apply_template(self.processor, messages, **options)
        return {name: value[0] for name, value in rendered.items()} if tokenize else rendered


def apply_template(writer: Any, messages: list[Message], **options: Any) -> Any:
    """Apply the chat template of a tokenizer or processor; what it refuses is a ValueError."""
    from jinja2 import TemplateError

    try:
        return writer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError) as error:
        rule = f"the chat template cannot render it ({error}); give a `data.chat_template` that can"
        raise ValueError(f"{rule}.") from error


def _function(tool: Any) -> dict[str, Any]:
    """Return the description or call of a function, which has a name."""
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"'tools' or a call has {tool!r:.80}; each must be an object with a name.")
    return function


def _without_arguments(messages: list[Message]) -> list[Message]:
    """Return a chat in which every call has no arguments."""
    messages = copy.deepcopy(messages)
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        function = _function(call)
        if function.get("arguments"):
            function["arguments"] = "{}" if isinstance(function["arguments"], str) else {}
    return messages


def reads_variable(template: str, name: str) -> bool:
    """Whether a chat template has this name somewhere."""
    return re.search(rf"\b{name}\b", template) is not None


def with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """Return a chat template in which variables have these values, unless a caller sets them."""
    sets = (f"{{% set {k} = {k} if {k} is defined else {v!r} %}}\n" for k, v in variables.items())
    return "".join(sets) + template


def _find_marked_template(writer: Any) -> str | None:
    """Return a template with {% generation %} marks: the model's, or TRL's of a known model."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not writer.chat_template:
        return None
    if has_generation_markers(writer.chat_template):
        return str(writer.chat_template)
    whole, writer = writer.chat_template, copy.copy(writer)
    writer.chat_template = _DEFAULTS.sub("", whole)  # TRL knows templates by their text
    defaults = whole.removesuffix(writer.chat_template)
    # TRL probes unknown templates with made-up chats, on which they may fail in any way.
    with contextlib.suppress(Exception):
        marked = get_training_chat_template(writer)
        return None if marked is None else defaults + marked
    return None


def _with_arguments(example: Example) -> Example:
    """Return a chat whose tool calls have their arguments as objects: texts would be quoted."""
    if not any("tool_calls" in message for message in example.messages):
        return example
    example = copy.deepcopy(example)
    for message in example.messages:
        for function in map(_function, message.get("tool_calls", ())):
            arguments = function.get("arguments")
            with contextlib.suppress(ValueError):
                if isinstance(arguments, str) and isinstance(json.loads(arguments), dict):
                    function["arguments"] = json.loads(arguments)
    return example


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    pairs = enumerate(zip(ids, others, strict=False))
    shorter = min(len(ids), len(others))
    return next((place for place, (token, other) in pairs if token != other), shorter)
