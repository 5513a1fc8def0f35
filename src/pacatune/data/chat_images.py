"""Images in chats: in the text of a message, each is its reference between two marks.

A reference is an absolute path, or a data URI where the data itself has the image.
"""

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

START, END = "\ufdd0", "\ufdd1"  # no characters: no text has them
IMAGE = re.compile(f"{START}([^{END}]*){END}")
"""An image in the text of a message."""


def references(messages: list[dict[str, Any]]) -> list[str]:
    """Return the images of a chat, in order."""
    return [image for message in messages for image in IMAGE.findall(message["content"])]


def mark_image(image: Any) -> str:
    """Return what stands for an image that a row names or holds."""
    if isinstance(image, dict):  # as tables keep them, and OpenAI
        image = image.get("bytes") or image.get("path") or image.get("url")
    if hasattr(image, "save"):
        data = io.BytesIO()
        image.convert("RGB").save(data, "PNG")
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
        {"type": "image", "image": open_image(piece)}
        if number % 2
        else {"type": "text", "text": piece}
        for number, piece in enumerate(IMAGE.split(message["content"]))
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
