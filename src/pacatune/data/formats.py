"""The accepted formats: which one a row has, and each as one kind of example."""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.data.read import Row, named
from pacatune.names import nearest

if TYPE_CHECKING:
    from PIL import Image

Message = dict[str, Any]

# Required columns, most specific first: a row that fits several is the first of them.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_ACCEPTED = " | ".join(", ".join(columns) for columns in COLUMNS.values())
# What chat templates know; the assistant's turns alone are learned.
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
# What ShareGPT's data calls them, as LLaMA-Factory reads it.
_SPEAKERS = {"human": "user", "gpt": "assistant", "function_call": "assistant"}
_SPEAKERS["observation"] = "tool"
# Columns that say something to the model, here or in other programs.
VARIABLES = "chat_template_kwargs"
"""Column of what a row sets of the chat template's variables; TRL's name."""
_OF_OTHERS = ("tools", "images", "system", "history", "functions", "documents", VARIABLES)
# Arguments of transformers beside a template's variables.
_ARGUMENTS = {"conversation", "messages", "tools", "chat_template", "add_generation_prompt"}
_ARGUMENTS |= {"continue_final_message", "tokenize", "padding", "truncation", "max_length"}
_ARGUMENTS |= {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
_ARGUMENTS |= {"tokenizer_kwargs", "processor_kwargs"}
# OpenAI's name for whether a message is learned; Axolotl's, TRL's and ms-swift's.
_WEIGHTS = ("weight", "train", "training", "loss")
# What they say of parts of a message, or of degrees.
_FINER = {"train_detail", "training_detail", "loss_scale"}

# In the text of a message, an image is its path or data URI between two marks, no characters.
START, END = "\ufdd0", "\ufdd1"
IMAGE = re.compile(f"{START}([^{END}]*){END}")
"""An image in the text of a message."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what is to be learned after it: both texts, or both lists of messages.

    A text of its own has an empty prompt. A chat has an empty list: every assistant turn in
    `completion` is learned, the other turns are context.
    """

    place: str
    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None = None
    skipped: list[int] = field(default_factory=list)
    """Turns of weight 0: not learned, whoever speaks."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template that the row sets."""

    @property
    def messages(self) -> list[Message]:
        """All turns of a chat."""
        return [*self.prompt, *self.completion]

    @property
    def images(self) -> list[str]:
        """The images of a chat, as their references."""
        return references(self.messages) if isinstance(self.completion, list) else []

    @property
    def learned_turns(self) -> list[int]:
        """Numbers, from 0, of the turns that are learned."""
        turns = range(len(self.prompt), len(self.messages))
        asked = {turn for turn in turns if self.messages[turn]["role"] == "assistant"}
        return sorted(asked - {*self.skipped})


def to_examples(
    rows: Iterable[Row], format: str = "auto", *, has_template: bool = True
) -> Iterator[Example]:
    """Yield one checked example per row; every row must have the format of the first.

    Without a chat template, instructions become plain text.
    """
    for row in rows:
        with named(row.place):
            format = _find_format(row.values, format)
            values, column = row.values, COLUMNS[format][-1]
            if format == "instruction":
                values, column = _from_instruction(values, has_template), "completion"
            elif COLUMNS[format][0] == column:  # a whole text or chat
                values = {**values, "prompt": None}
            if format == "sharegpt" and values.get("system"):
                turns = [{"role": "system", "content": values["system"]}, *values[column]]
                values |= {column: turns, "system": None}
            yield to_answer(row.place, values, column, format)


def _find_format(values: dict[str, Any], format: str) -> str:
    """Return the format that the columns of a row fit, which that of the rows before must be."""
    present = present_columns(values)
    fits = [name for name, needed in COLUMNS.items() if present.issuperset(needed)]
    if format in fits:
        return format
    if format == "auto" and fits:
        return fits[0]
    needed = "" if format == "auto" else f" of format {format!r} ({', '.join(COLUMNS[format])})"
    raise ValueError(
        f"the columns {sorted(present)} are not those{needed}; rename them, or split the data: one "
        f"data set has one format. Accepted are {_ACCEPTED}."
    )


def to_texts(rows: Iterable[Row], format: str = "") -> Iterator[dict[str, Any]]:
    """Yield the `text` of each row, its `label`, a text too, and its `place`.

    Where a table names its classes, the label is the name, and `number` the table's number of it.
    """
    for row in rows:
        with named(row.place):
            check_columns(row.values, "text", "label")
            text, label, number = row.values["text"], row.values["label"], None
            if (classes := row.classes.get("label")) is not None:
                if not 0 <= label < len(classes):
                    raise ValueError(f"has no class (label {label}); give it one, or remove it.")
                label, number = classes[label], label
            if not isinstance(text, str) or not text.strip() or label == "":
                both = f"text {str(text)[:40]!r} and label {label!r:.40}"
                raise ValueError(f"has {both}; a classifier needs both.")
        yield {"text": text, "label": str(label), "number": number, "place": row.place}


def check_columns(values: dict[str, Any], *needed: str) -> None:
    """Refuse a row that lacks a column."""
    present = present_columns(values)
    if missing := [column for column in needed if column not in present]:
        rule = f"field {missing[0]!r} is missing (columns {sorted(present)})"
        raise ValueError(f"{rule}; this task needs {', '.join(needed)}.")


def present_columns(values: dict[str, Any]) -> set[str]:
    """Return the columns that hold something; tables fill what a row lacks with nulls."""
    return {column for column, value in values.items() if value is not None}


def to_answer(
    place: str, values: dict[str, Any], column: str, format: str = "preference"
) -> Example:
    """Return the example of a row's prompt, if it has one, and what `column` answers to it."""
    prompt, completion = values.get("prompt"), values[column]
    is_chat = format in ("messages", "sharegpt") or isinstance(completion, list)
    if prompt is not None and isinstance(prompt, list) != is_chat:
        both = f"'prompt' ({prompt!r:.40}) and {column!r} ({completion!r:.40})"
        raise ValueError(f"{both} must both be texts or both lists of messages.")
    used = ["tools", VARIABLES, *(["images"] if format in COLUMNS else [])] if is_chat else []
    for name in _OF_OTHERS:
        if name not in used and values.get(name) and format != "text":
            raise ValueError(
                f"column {name!r} is not used by format {format!r}, so the model would not see it; "
                "write it into `messages` and `tools`, or remove it."
            )
    if not is_chat:
        start = "" if prompt is None else _text(values, "prompt")
        return Example(place, start, _text(values, column))
    images = iter(_listed(values.get("images"))) if values.get("images") else None
    context = [] if prompt is None else _messages(values, "prompt", images)
    messages = _messages(values, column, images)
    chat = [*context, *messages]
    if left := "".join(map(mark_image, images or ())):
        asked = [message for message in chat if message["role"] == "user"]
        if not asked or references(asked):
            raise ValueError("'images' has more than the messages show as <image>.")
        asked[0]["content"] = left + asked[0]["content"]
    skipped = [turn for turn, message in enumerate(chat) if message.pop("weight", None) == 0]
    tools = values.get("tools")
    if isinstance(tools, str):  # as tables keep them
        tools = _parse_json(tools, "tools") if tools.strip() else None
    if not isinstance(tools, list | None):
        raise ValueError(f"'tools' is {tools!r:.80}; it must be a list of functions.")
    example = Example(place, context, messages, tools, skipped, row_variables(values))
    if not example.learned_turns:
        rule = "has no assistant turn, or none of weight 1, so nothing to learn"
        raise ValueError(f"{column!r} {rule}; add the answer or remove the row.")
    return example


def row_variables(values: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the chat template that a row sets."""
    value = values.get(VARIABLES)
    if isinstance(value, str):  # as tables keep them
        value = _parse_json(value, VARIABLES) if value.strip() else None
    return check_variables(f"{VARIABLES!r}", value)


def check_variables(name: str, value: Any) -> dict[str, Any]:
    """Return variables of a chat template; refuse what cannot be some."""
    if not isinstance(value, dict | None):
        raise ValueError(
            f'{name} is {value!r:.80}; it must be an object, as {{"enable_thinking": false}}.'
        )
    for key in value or {}:
        if not isinstance(key, str) or not key.isidentifier() or key in _ARGUMENTS:
            raise ValueError(
                f"{name} sets {key!r:.80}, which is no variable of a chat template; remove it."
            )
    return value or {}


def to_prompt(values: dict[str, Any]) -> str | list[Message]:
    """Return the prompt of a row: a text, or a chat that somebody else than the model ends."""
    if not isinstance(values["prompt"], list):
        if values.get(VARIABLES):
            raise ValueError(f"column {VARIABLES!r} is not used by a text; remove it.")
        return _text(values, "prompt")
    row_variables(values)
    messages = _messages(values, "prompt", None)
    if messages[-1]["role"] == "assistant" or references(messages):
        rule = "ends with an assistant turn, which the model is to write, or has an image"
        raise ValueError(f"'prompt' {rule}; take it out.")
    return messages


def _from_instruction(values: dict[str, Any], has_template: bool) -> dict[str, Any]:
    names = ("instruction", *(["input"] if values.get("input") else []), "output")
    texts = {name: _text(values, name) for name in names}
    answer: Any = texts.pop("output")
    prompt: Any = "".join(f"### {name.title()}:\n{text}\n\n" for name, text in texts.items())
    prompt += "### Response:\n"  # Stanford Alpaca's headings, without its preamble
    if has_template:
        prompt = [{"role": "user", "content": "\n\n".join(texts.values())}]
        answer = [{"role": "assistant", "content": answer}]
    return {**values, "prompt": prompt, "completion": answer}


def _text(values: dict[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} is {value!r:.80}; it must be a text. Fill it.")
    return value


def _messages(values: dict[str, Any], column: str, images: Iterator[Any] | None) -> list[Message]:
    value, messages = values[column], []
    if not isinstance(value, list) or not value:
        rule = 'it must be a list of messages, as {"role": "user", "content": "..."}'
        raise ValueError(f"{column!r} is {value!r:.80}; {rule}.")
    for turn, message in enumerate(value):
        with named(f"{column}[{turn}]"):
            messages.append(_message(message, images))
    return messages


def _message(message: Any, images: Iterator[Any] | None) -> Message:
    if isinstance(message, dict) and "from" in message:
        message = _from_sharegpt(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{message!r:.80} is no object with the strings 'role' and 'content'.")
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept["role"]
    if role not in _ROLES:  # an answer of another name would not be learned
        near = nearest(role, (*_SPEAKERS, *_ROLES))
        hint = f"did you mean {_SPEAKERS.get(near, near)!r}? " if near else ""
        raise ValueError(f"the role is {role!r:.80}; {hint}roles are {', '.join(_ROLES)}.")
    if finer := _FINER & kept.keys():
        raise ValueError(
            f"{min(finer)!r} is not read: a turn is learned as a whole or not at all, by a "
            "'weight' of 0 or 1."
        )
    weights = [kept.pop(name) for name in _WEIGHTS if name in kept]
    allowed = (0, 1) if role == "assistant" else (0,)
    if any(weight not in allowed or weight != weights[0] for weight in weights):
        rule = "it must be 0 or 1, and 1 is for assistant turns alone"
        raise ValueError(f"the weight is {weights[0]!r}; {rule}.")
    calls = kept.get("tool_calls")
    if not isinstance(calls, list | None):
        raise ValueError(f"'tool_calls' is {calls!r:.80}; it must be a list of calls.")
    content = _content(kept.get("content", ""), images)
    if not isinstance(content, str) or not (content.strip() or calls or kept.get("function_call")):
        raise ValueError(f"the content is {content!r:.80}; it must be a text. Fill it.")
    if role == "assistant" and START in content:
        raise ValueError("an answer has an image, and models answer in text; take it out.")
    return {**kept, "content": content, **({"weight": weights[0]} if weights else {})}


def _content(content: Any, images: Iterator[Any] | None) -> Any:
    """Return parts as one text: in lines, as vLLM serves OpenAI's, with images as references."""

    def show(image: Any = None) -> str:
        image = next(images or iter(()), None) if image is None else image
        if image is None:
            raise ValueError("more images are shown than the column 'images' has; add them.")
        return mark_image(image)

    if isinstance(content, str) and images is not None:
        first, *others = content.split("<image>")
        return first + "".join(show() + other for other in others)
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind in ("image", "image_url"):
            names = ("image", "path", "url", "image_url")
            texts.append(show(next((part[name] for name in names if part.get(name)), None)))
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"a part is {kind!r:.40}; give text, image or image_url.")
    return "\n".join(texts).replace(f"{END}\n", END).replace(f"\n{START}", START)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _from_sharegpt(turn: dict[str, Any]) -> Message:
    """Return one of ShareGPT's turns as a message."""
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker, content = str(turn["from"]), turn.get("value")
    if speaker == "function_call":
        calls = _listed(_parse_json(content, "value"))
        rest["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        content = ""
    return {**rest, "role": _SPEAKERS.get(speaker, speaker), "content": content}


def _parse_json(text: Any, column: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"{column!r} is {text!r:.80}; it must be JSON.") from None


def references(messages: list[dict[str, Any]]) -> list[str]:
    """Return the images of a chat, in order."""
    return [image for message in messages for image in IMAGE.findall(message["content"])]


def mark_image(image: Any) -> str:
    """Return what stands for an image that a row names or holds."""
    if isinstance(image, dict):  # as tables keep them, and OpenAI
        image = image.get("bytes") or image.get("path") or image.get("url")
    if hasattr(image, "save"):
        data = io.BytesIO()
        to_rgb(image).save(data, "PNG")
        image = data.getvalue()
    if isinstance(image, bytes):
        image = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    if not isinstance(image, str):
        raise ValueError(f"the image is {image!r:.40}; give a path or a data URI.")
    if not image.startswith("data:image/"):
        path = Path(image).expanduser().resolve()
        if "://" in image or not path.is_file():
            rule = "which is no file here; nothing is fetched while data is read: give its path"
            raise ValueError(f"the image is {image!r:.80}, {rule}.")
        image = str(path)
    return f"{START}{image}{END}"


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of texts and opened images, as processors want."""
    pieces = [
        {"type": "image", "image": open_image(stored_image(piece))}
        if number % 2
        else {"type": "text", "text": piece}
        for number, piece in enumerate(IMAGE.split(message["content"]))
        if piece
    ]
    return {**message, "content": pieces}


def stored_image(reference: str) -> dict[str, Any]:
    """Return an image of a chat as tables of datasets hold it: its bytes, or its path."""
    if reference.startswith("data:"):
        return {"bytes": base64.b64decode(reference.partition(",")[2]), "path": None}
    return {"bytes": None, "path": reference}


def open_image(stored: dict[str, Any]) -> "Image.Image":
    """Return an image that a table of datasets holds, upright and in 8-bit RGB."""
    from PIL import Image

    held = stored["bytes"]
    try:
        with Image.open(stored["path"] if held is None else io.BytesIO(held)) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError is what Pillow raises for some damaged files.
        raise ValueError(str(error)) from error


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Return an opened image upright, on white where it is transparent, in 8-bit RGB."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow cuts off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have an unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
