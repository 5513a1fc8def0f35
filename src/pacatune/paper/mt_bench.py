"""What Tables 2, 3 and 5 share: scores of MT-Bench, and those of the models before training."""

from pacatune.paper.table import Quantity

__all__ = ["LLAMA3_8B", "SCORES"]

# Points of 10 by GPT4o-mini. The text calls 5.12 to 5.28 comparable (section 4.2).
_MARGIN = 0.2
_TITLES = {
    "humanities": "humanities",
    "stem": "STEM",
    "roleplay": "roleplay",
    "extraction": "extraction",
    "writing": "writing",
    "reasoning": "reasoning",
    "coding": "coding",
    "math": "math",
    "average": "average",
}
SCORES = tuple(
    Quantity(key=key, title=title, unit="points", kind="score", margin=_MARGIN)
    for key, title in _TITLES.items()
)
# "No tuning" of LLaMA3-8B: the same line in all three tables.
LLAMA3_8B = (6.25, 5.70, 5.45, 4.85, 5.20, 4.40, 3.20, 1.95, 4.62)
