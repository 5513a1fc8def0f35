"""Upload a finished run to the hub, where the command line asks for it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from pacatune.files.owned_folder import OURS

# What a run keeps in its folder to go on, and its log.
_KEPT_HERE = ["checkpoint-*", "runs/*", f"{OURS}/*"]


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


def push_result(folder: Path, repository: str, arguments: Any) -> str:
    """Upload what a finished run leaves, without checkpoints and logs; return its address."""
    try:
        commit = HfApi(token=arguments.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=_KEPT_HERE,
            commit_message="Upload the result of a run of pacatune",
            revision=arguments.hub_revision,
        )
    except Exception as error:
        raise ConnectionError(
            f"the result is in {folder}, but uploading it failed ({type(error).__name__}: "
            f"{error}); try again with `hf upload {repository} {folder} --exclude 'checkpoint-*' "
            f"'runs/*' '{OURS}/*'`."
        ) from error
    return commit.repo_url.url
