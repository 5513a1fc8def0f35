"""Generated blocks of a document: between `<!-- KIND: NAME -->` and `<!-- end -->`."""

import re
from collections.abc import Callable
from pathlib import Path


def render(path: Path, kind: str, body: Callable[[str], str]) -> str:
    """Return a document's text with each block of `kind` written anew.

    Args:
        path: Markdown file.
        kind: First word of the comments that open the blocks.
        body: Gives the text of the block with a name.

    Raises:
        ValueError: If a block is not closed.
    """
    text = path.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {kind}: ([\w-]+) -->\n)(?:(?!<!-- ).*\n)*?(<!-- end -->)")
    opened, closed = len(re.findall(rf"<!-- {kind}: ", text)), len(block.findall(text))
    if opened != closed:
        raise ValueError(f"{path}: {opened} blocks of kind {kind!r}, {closed} closed; add the end.")
    return block.sub(lambda match: f"{match[1]}{body(match[2]).rstrip()}\n{match[3]}", text)


def rewrite(paths: list[Path], kind: str, body: Callable[[str], str]) -> list[Path]:
    """Write the blocks of `kind` into the documents; return those that changed."""
    changed = []
    for path in paths:
        text = render(path, kind, body)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed
