"""README.md beside the result of a run on images."""

from pathlib import Path

from pacatune.installation import repository_command
from pacatune.methods import METHODS
from pacatune.training.card import compose_card
from pacatune.training.image.config import ImageRunConfig
from pacatune.training.image.report import ImageReport


def write_card(config: ImageRunConfig, report: ImageReport, folder: Path) -> None:
    """Write README.md with the front matter that model hubs read."""
    is_adapter = METHODS[config.method].has_adapter
    front = {
        "base_model": report.model,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-classification",
        "tags": sorted({config.method, "pacatune"}),
    }
    classes = ", ".join(report.classes[:20]) + (", ..." if len(report.classes) > 20 else "")
    loading = (
        f"Tells apart {len(report.classes)} classes: {classes}.\n\n"
        f"Install pacatune ({repository_command('vision')}), then:\n\n"
        "```python\nfrom pacatune.training.image import load_result\n\n"
        'classifier = load_result("FOLDER")\n'
        'print(classifier.classify("IMAGE.png"))  # class -> probability\n```\n'
    )
    if is_adapter:
        loading += (
            "\n`classifier.model` is a PEFT model; `classifier.model.merge_and_unload()` makes it "
            "a plain one.\n"
        )
    text = compose_card(config, report, front, METHODS[config.method].title, loading)
    (folder / "README.md").write_text(text, encoding="utf-8")
