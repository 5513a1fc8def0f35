"""README.md beside the result: what it is, how to load it, how it was made."""

from pathlib import Path
from typing import Any

import yaml

from pacatune.installation import repository_command
from pacatune.methods import METHODS, Method
from pacatune.training.any_run import AnyRun
from pacatune.training.config import RunConfig
from pacatune.training.report import Report, RunReport


def write_card(config: RunConfig, report: Report, folder: Path) -> None:
    """Write README.md with the front matter that model hubs read."""
    method = METHODS[config.method]
    name = method.title
    if config.model.quantization and not name.startswith("Q"):
        name = f"Q{name}"
    front = {
        "base_model": report.model,
        "library_name": "peft" if method.has_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({config.method, "pacatune", "sft", "trl"}),
    }
    text = compose_card(config, report, front, name, _loading(method, report.model))
    (folder / "README.md").write_text(text, encoding="utf-8")


def compose_card(
    config: AnyRun, report: RunReport, front: dict[str, Any], name: str, loading: str
) -> str:
    """Return the text of a card, whatever the task.

    Args:
        config: The run.
        report: Its results.
        front: Front matter.
        name: Of the method.
        loading: Markdown that says how to load the result.
    """
    rows = "\n".join(f"| {key} | {value} |" for key, value in report.table())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {name} fine-tuning of {Path(report.model).name}\n\n"
        f"{loading}\n"
        f"## Training\n\n"
        f"Data: `{config.data.path}` ({report.num_train_examples:,} examples, "
        f"{report.num_eval_examples:,} held out). "
        f"Settings: [config.yaml](config.yaml), which `pacatune {config.command} --config "
        f"config.yaml` repeats. Details: [report.md](report.md), [report.json](report.json).\n\n"
        f"| | |\n|---|---|\n{rows}\n\n![Loss](loss.png)\n"
    )


def _loading(method: Method, model: str) -> str:
    if not method.has_adapter:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
        )
    kind = "PaCA" if method.is_paca else method.title
    package = f"import pacatune  # makes {kind} known to PEFT\n" if method.needs_pacatune else ""
    code = (
        f"```python\n{package}from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({model!r})\n"
        'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n\n'
    )
    if not method.needs_pacatune:
        return code
    return (
        f"Install pacatune ({repository_command()}), then:\n\n" + code + "```bash\n"
        f'pacatune generate --model {model} --adapter FOLDER --prompt "..."\n'
        f"pacatune merge --model {model} --adapter FOLDER --output MERGED      # a plain model\n"
        f"pacatune export --model {model} --adapter FOLDER --to lora --output LORA  "
        "# an exact LoRA adapter, for any server\n```\n\n"
    )
