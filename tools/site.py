"""What mkdocs builds beside docs/: the page of all commands, and llms.txt (llmstxt.org)."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from mkdocs.structure.files import File

from tools import cli_reference

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
# What begins a block that is no prose: headings, tables, lists, generated blocks, documented names.
_NOT_PROSE = ("#", "|", "- ", "<!--", ":::", "    ")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated files; mkdocs calls it."""
    files.append(File.generated(config, "cli.md", content=cli_reference.page()))
    text = contents(config, lambda page: files.get_file_from_path(page).content_string)
    files.append(File.generated(config, "llms.txt", content=text))
    return files


def contents(config: Any, read: Callable[[str], str]) -> str:
    """Return llms.txt: the sections of the site; each page is said by its own first paragraph."""
    home, *sections = config["nav"]
    (front,) = home.values()
    parts = [f"# {config['site_name']}", f"> {config['site_description']}", _about(read(front))]
    for section in sections:
        ((title, pages),) = section.items()
        parts += [f"## {title}", "\n".join(_lines(pages, read))]
    return "\n\n".join(parts) + "\n"


def _lines(pages: list[str], read: Callable[[str], str]) -> Iterator[str]:
    for page in pages:
        text = read(page)
        title = text.partition("\n")[0].removeprefix("# ").replace("`", "")
        yield f"- [{title}]({page.removesuffix('.md')}.html): {_about(text)}"


def _about(text: str) -> str:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"\n\s*\n", prose)
    first = next(one for one in blocks if one.strip() and not one.startswith(_NOT_PROSE))
    plain = _LINK.sub(r"\1", " ".join(first.split()))
    return re.sub(r"(?<=[.?]) [^.?]*:$", "", plain)  # announces what follows it there
