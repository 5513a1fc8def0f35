"""How to install pacatune and its optional packages: what messages, cards and pages say."""

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

# By which commands see that the extra `train` is installed, under the names to import.
_TRAIN = ("trl", "datasets", "rich", "matplotlib", "jinja2")


def install_command(extra: str | None = None) -> str:
    """Return what installs pacatune, or an extra of pyproject.toml beside it.

    No package index has it yet, so that it names the repository.
    """
    what = "." if extra is None else f"'.[{extra}]'"
    return f"pip install -e {what} in a checkout of pacatune's repository"


def require_extra(who: str, extra: str, packages: tuple[str, ...] = _TRAIN) -> None:
    """Refuse to start what needs the packages of an extra, or only some of them, without these."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{who} needs packages that are not installed ({', '.join(missing)}): "
            f"{install_command(extra)}"
        )


def require(package: str, least: str, feature: str) -> None:
    """Refuse a feature that an old release of a package cannot have.

    Args:
        package: PEFT or transformers, as messages call it.
        least: The first version that can.
        feature: What needs it, for the message.

    Raises:
        ValueError: Names feature and versions.
    """
    installed = version(package.lower())
    if Version(installed).release < Version(least).release:
        raise ValueError(
            f"{feature} needs {package} {least} or newer, and this is {installed}; "
            f"pip install -U {package.lower()}."
        )
