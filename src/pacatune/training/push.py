"""Upload a finished run to the hub, where the command line asks for it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError

from pacatune.files.owned_folder import OURS

# What a run keeps in its folder to go on, and its log.
_KEPT_HERE = ["checkpoint-*", "runs/*", f"{OURS}/*"]


def open_repository(repository: str, arguments: Any) -> str:
    """Create the repository, if there is none; return its full name.

    Called before training, so that no work is done that cannot be uploaded.

    Raises:
        ValueError: If it is no name of a repository, or nobody is logged in.
        ConnectionError: If the hub does not let us write there.
    """
    if not (arguments.hub_token or get_token()):
        raise ValueError(
            f"`--push_to_hub` ({repository!r}) needs a token of the hub that may write; run "
            "`hf auth login`, or set HF_TOKEN."
        )
    try:
        created = HfApi(token=arguments.hub_token).create_repo(
            repository, private=arguments.hub_private_repo, exist_ok=True
        )
    except HFValidationError as error:
        raise ValueError(
            f"`--push_to_hub` ({repository!r}) is no name of a repository ({error}); give "
            "ORGANISATION/NAME, or NAME for your own."
        ) from error
    except Exception as error:  # no network, no right, a wrong token: a dozen kinds
        raise ConnectionError(
            f"`--push_to_hub` ({repository!r}): the repository can neither be found nor created "
            f"({type(error).__name__}: {error}); check name, token and network."
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
