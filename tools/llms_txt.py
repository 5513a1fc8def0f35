"""Write docs/llms.txt, the site's table of contents for language models (llmstxt.org).

python -m tools.llms_txt

Sections are those of mkdocs.yml; each page is said by its own first paragraph.
"""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "llms.txt"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
# What begins a block that is no prose: headings, tables, lists, notes, generated blocks.
_NOT_PROSE = ("#", "|", "- ", "*Not run", "<!--", ":::", "    ")


def render():
    """Return the text of the file."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (home, *sections) = config["nav"]
    (front,) = home.values()
    parts = [f"# {config['site_name']}", f"> {config['site_description']}", about(front)]
    for section in sections:
        ((title, pages),) = section.items()
        parts += [f"## {title}", "\n".join(_lines(pages))]
    return "\n\n".join(parts) + "\n"


def _lines(pages):
    for page in pages:
        if isinstance(page, dict):
            for inner in page.values():
                yield from _lines(inner)
        else:
            yield f"- [{_title(page)}]({page.removesuffix('.md')}.html): {about(page)}"


def _title(page):
    return re.search(r"^# (.+)$", _text(page), re.MULTILINE)[1].replace("`", "")


def about(page):
    """Return the first paragraph of a page; of a page of the Python API, what it documents."""
    text = _text(page)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n", prose):
        if block.strip() and not block.startswith(_NOT_PROSE):
            plain = _LINK.sub(r"\1", " ".join(block.split()))
            return re.sub(r"(?<=[.?]) [^.?]*:$", "", plain)  # announces what follows it there
    return ", ".join(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def _text(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def main():
    """Rewrite docs/llms.txt if it is another."""
    text = render()
    if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
        DOCUMENT.write_text(text, encoding="utf-8")
        print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    sys.exit(main())
