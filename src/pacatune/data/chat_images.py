"""Images in chats: where a row names them, in the words of TRL, OpenAI and LLaMA-Factory.

In the text of a message an image is its reference between two marks: a path, or a data URI.
"""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.data.read import Row

if TYPE_CHECKING:
    from PIL.Image import Image

_START, _END = "\ufdd0", "\ufdd1"  # no characters: no text has them
IMAGE = re.compile(f"{_START}([^{_END}]*){_END}")
"""An image in the text of a message."""
_TAG = "<image>"
_CHATS = ("messages", "conversations", "prompt", "completion")
_DATA = "data:image/png;base64,"


def references(messages: list[dict[str, Any]]) -> list[str]:
    """Return the images of a chat, in order."""
    texts = (message.get("content") for message in messages)
    return [image for text in texts if isinstance(text, str) for image in IMAGE.findall(text)]


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of texts and opened images, as processors want."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    pieces = [
        {"type": "image", "image": open_image(piece)} if number % 2 else _part(piece)
        for number, piece in enumerate(IMAGE.split(content))
        if piece
    ]
    return {**message, "content": pieces}


def open_image(reference: str) -> "Image":
    """Open an image of a chat."""
    from PIL import Image

    source: Any = reference
    if reference.startswith("data:"):
        source = io.BytesIO(base64.b64decode(reference.partition(",")[2]))
    with Image.open(source) as image:
        return image.convert("RGB")


def with_images(row: Row) -> Row:
    """Return a row whose images stand in the texts of its messages.

    They are given as parts of a content (`{"type": "image"}`, alone or with the image; OpenAI's
    `image_url`), or as `<image>` in a text, or in the column `images` alone: then they come first.

    Raises:
        ValueError: If images are missing, left over, or cannot be opened.
    """
    column = row.values.get("images") or []
    waiting = iter(column if isinstance(column, list) else [column])
    lists = {name: row.values[name] for name in _CHATS if isinstance(row.values.get(name), list)}
    if not lists or not (column or any(map(_has_image, chain(*lists.values())))):
        return row
    placed = {
        name: [
            _placed(message, waiting, f"{row.place}: {name}[{i}]", bool(column))
            for i, message in enumerate(chat)
        ]
        for name, chat in lists.items()
    }
    left = [_reference(image, f"{row.place}: 'images'") for image in waiting]
    turns = [m for m in chain(*placed.values()) if isinstance(m, dict) and m.get("role") == "user"]
    if left and (not turns or references(turns)):
        raise ValueError(
            f"{row.place}: 'images' has {len(left)} more than the messages show; give each its "
            '{"type": "image"} or <image>.'
        )
    if left:
        turns[0]["content"] = "".join(map(_marked, left)) + str(turns[0].get("content") or "")
    values = {name: value for name, value in row.values.items() if name != "images"}
    return replace(row, values={**values, **placed})


def _placed(message: Any, waiting: Iterator[Any], what: str, has_column: bool) -> Any:
    if not isinstance(message, dict):
        return message
    content, message = message.get("content"), dict(message)
    if isinstance(content, list):
        texts = [_text(part, waiting, what) for part in content]
        # Neighbouring texts are lines, as elsewhere; an image needs none.
        joined = "\n".join(texts).replace(f"{_END}\n", _END).replace(f"\n{_START}", _START)
        message["content"] = joined
    elif isinstance(content, str) and has_column and _TAG in content:
        first, *others = content.split(_TAG)
        images = (_marked(_reference(_next(waiting, what), what)) for _ in others)
        message["content"] = first + "".join(map("".join, zip(images, others, strict=True)))
    if message.get("role") == "assistant" and references([message]):
        raise ValueError(f"{what} is an answer with an image; models answer in text. Take it out.")
    return message


def _text(part: Any, waiting: Iterator[Any], what: str) -> str:
    """Return the text of one part, an image as its reference."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"{what} has a part of the type {kind!r}; parts must be text, image or image_url."
        )
    found = next((part[n] for n in ("image", "path", "url", "image_url") if part.get(n)), None)
    if isinstance(found, dict) and "url" in found:
        found = found["url"]
    return _marked(_reference(_next(waiting, what) if found is None else found, what))


def _next(waiting: Iterator[Any], what: str) -> Any:
    image = next(waiting, None)
    if image is None:
        raise ValueError(f"{what} shows more images than the column 'images' has; add them.")
    return image


def _reference(image: Any, what: str) -> str:
    """Return what stands for an image: its absolute path, or the image itself as a data URI."""
    if isinstance(image, dict):  # as tables keep them
        image = image.get("bytes") or image.get("path")
    if hasattr(image, "save"):
        data = io.BytesIO()
        image.convert("RGB").save(data, "PNG")
        image = data.getvalue()
    if isinstance(image, bytes):
        return _DATA + base64.b64encode(image).decode()
    if not isinstance(image, str):
        raise ValueError(f"{what} has an image that is {image!r:.40}; give a path or a data URI.")
    if image.startswith("data:image/"):
        return image
    if "://" in image:
        raise ValueError(
            f"{what} has the image {image!r:.80}; nothing is fetched while data is read: download "
            "it and give its path."
        )
    path = Path(image).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{what} has the image {image!r:.80}, which does not exist.")
    return str(path)


def _has_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else ()
    return any(isinstance(p, dict) and p.get("type") in ("image", "image_url") for p in parts)


def _marked(reference: str) -> str:
    return f"{_START}{reference}{_END}"


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class ImageTokenizer:
    """A processor of images and texts, in the place of a tokenizer."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.chat_template, self.image_token = processor.chat_template, processor.image_token

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # while it is copied to another process
            raise AttributeError(name)
        return getattr(self.processor.tokenizer, name)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool = True, **options: Any
    ) -> Any:
        """Return the text of a chat, or its tokens with as many for each image as it has."""
        options.pop("return_dict", None)
        parts = [as_parts(message) for message in messages]
        if not tokenize:
            return self.processor.apply_chat_template(parts, tokenize=False, **options)
        made = self.processor.apply_chat_template(
            parts,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"add_special_tokens": False},
            **options,
        )
        return {
            name: list(made[name][0]) for name in ("input_ids", "assistant_masks") if name in made
        }


class ImageCollator:
    """Makes padded batches of chats with images, as the model takes them."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows."""
        import torch

        from pacatune.data.encode import IGNORED

        images = [[open_image(reference) for reference in row["images"]] for row in rows]
        batch = self._processor(
            text=[row["text"] for row in rows],
            images=images if any(images) else None,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for place, row in enumerate(rows):
            tokens = batch["input_ids"][place, : len(row["input_ids"])].tolist()
            assert tokens == row["input_ids"], f"{row['place']} is tokenized otherwise in a batch"
            labels[place, : len(tokens)] = torch.tensor(row["labels"])
        return {**batch, "labels": labels}
