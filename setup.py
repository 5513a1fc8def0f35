"""The description of a release: README without what leads into the repository."""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"<picture>.*?</picture>\n*|<!--.*?-->\n?", "", text)
link = r"\[([^\]]+)\]\((?!https?:)[^)]+\)"
text = re.sub(rf"\s\({link}\)", "", text)  # a remark that is nothing but a link
setup(long_description=re.sub(link, r"\1", text), long_description_content_type="text/markdown")
