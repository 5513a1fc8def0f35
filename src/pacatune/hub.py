"""Whether the hub has a name: asked once, where its client would try again for half a minute."""

from functools import cache
from pathlib import Path
from typing import Literal

_TIMEOUT_SECONDS = 10


@cache
def check_on_hub(
    name: str,
    option: str,
    *,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
) -> None:
    """Refuse the name of a model or data set that is neither here nor on the hub."""
    if Path(name).expanduser().exists():
        return
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":
        from datasets.config import HF_DATASETS_CACHE

        cached.append(Path(HF_DATASETS_CACHE) / name.replace("/", "___"))
    if any(folder.is_dir() for folder in cached):
        return
    what = "model" if kind == "model" else "data set"
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)
    except Exception as error:  # offline, missing, gated, misspelled: a dozen kinds
        reason = type(error).__name__
        raise FileNotFoundError(
            f"`{option}` ({name!r}) is neither a file or folder here nor a {what} of the hub that "
            f"can be reached ({reason}); check the path or the network."
        ) from error
