"""Upload a finished run to the hub, where the command line asks for it."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from pacatune.adapters.folder import CONFIG_NAME as ADAPTER_CONFIG
from pacatune.training.config_file import CONFIG_NAME
from pacatune.training.output import run_folder

# What a run keeps in its folder to go on, and its log.
_KEPT_HERE = ("checkpoint-*", "runs/*")


def open_repository(repository: str, arguments: Any) -> str:
    """Create the repository, if there is none; return its full name.

    Called before training, so that no work is done that cannot be uploaded.
    """
    try:
        created = HfApi(token=arguments.hub_token).create_repo(
            repository, private=arguments.hub_private_repo, exist_ok=True
        )
    except Exception as error:  # no network, no right, a wrong name or token: a dozen kinds
        raise ConnectionError(
            f"`--push_to_hub` ({repository!r}): the repository can neither be found nor created "
            f"({type(error).__name__}: {error}); give ORGANISATION/NAME, or NAME for your own, and "
            "a token that may write (`hf auth login`, or HF_TOKEN), and check the network."
        ) from error
    return created.repo_id


def push_result(folder: Path, repository: str, arguments: Any, *, with_config: bool = False) -> str:
    """Upload what the run wrote, without checkpoints and logs; return its address.

    Nothing of it names a folder of this machine, but for config.yaml where that is asked for.
    """
    left_out = [*_KEPT_HERE, *([] if with_config else [CONFIG_NAME])]
    owned = run_folder(folder).owned()
    names = [name for name in owned if not any(fnmatchcase(name, pattern) for pattern in left_out)]
    contents: dict[str, Any] = {name: str(folder / name) for name in names}
    if ADAPTER_CONFIG in contents:
        contents[ADAPTER_CONFIG] = _public_config(folder / ADAPTER_CONFIG)
    try:
        commit = HfApi(token=arguments.hub_token).create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message="Upload the result of a run of pacatune",
            revision=arguments.hub_revision,
        )
    except Exception as error:
        included = " ".join(f"--include '{name}'" for name in names)
        raise ConnectionError(
            f"the result is in {folder}, but uploading it failed ({type(error).__name__}: "
            f"{error}); try again with `hf upload {repository} {folder} {included}`."
        ) from error
    return commit.repo_url.url


def _public_config(path: Path) -> bytes:
    """Return an adapter's configuration that has the name alone of a base in a folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if base and Path(base).is_absolute():
        config["base_model_name_or_path"] = Path(base).name
    return json.dumps(config, indent=2, sort_keys=True).encode()
