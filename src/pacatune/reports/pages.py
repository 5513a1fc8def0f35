"""Pages of HTML, by Jinja2 templates: each is one file that loads nothing from elsewhere."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render_page(template: str, **values: Any) -> str:
    """Return a page by a template of `reports/templates`, which shows the values, escaped."""
    return _environment().get_template(template).render(**values) + "\n"


def inline_svg(svg: str, prefix: str) -> Markup:
    """Return an SVG element of ours whose names inside begin with a prefix unique on the page."""
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pacatune.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment


def _prose(text: str) -> Markup:
    """Escape a text and set its `code` and **bold** words."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped))
