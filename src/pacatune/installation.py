"""How to install pacatune: from its repository, since no package index has it yet."""

__all__ = ["install_command"]


def install_command(extra: str | None = None) -> str:
    """Return what installs pacatune, for messages: a command, and the folder to run it in.

    Args:
        extra: A group of optional packages, such as "quant" (pyproject.toml lists them).
    """
    what = "." if extra is None else f"'.[{extra}]'"
    return f"pip install -e {what} in a checkout of pacatune's repository"
