"""Where numbers come from: packages, commit, processor."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("pacatune", "torch", "transformers", "peft")
_PACKAGE_FOLDER = Path(__file__).parents[1]


def package_version(name: str) -> str | None:
    """Return the release of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(*more: str) -> dict[str, str]:
    """Return the releases of Python, of what decides the numbers, and of more if installed."""
    own = {"python": platform.python_version()}
    # Run from a checkout, our own is not installed.
    return own | {name: number for name in (*_PACKAGES, *more) if (number := package_version(name))}


def versions_text(releases: Mapping[str, str]) -> str:
    """Return releases as a sentence's part: `torch 2.13.0, peft 0.21.2`."""
    return ", ".join(f"{name} {number}" for name, number in releases.items())


def commit(folder: Path = _PACKAGE_FOLDER, *paths: str) -> dict[str, Any]:
    """Return `commit` and `is_modified` of a checkout's paths; None where git has none of them."""
    paths = paths or (".",)
    # An environment may lie in a repository of its user, whose commit says nothing about us.
    if not _git("ls-files", "--", *paths, folder=folder):
        return {"commit": None, "is_modified": None}
    return {
        "commit": _git("rev-parse", "HEAD", folder=folder),
        "is_modified": bool(_git("status", "--porcelain", "--", *paths, folder=folder)),
    }


def commit_text(record: Mapping[str, Any]) -> str:
    """Return the commit of a result as a sentence's part; empty where it is not known."""
    if not record.get("commit"):
        return ""
    changed = ", with changes that were not committed," if record["is_modified"] else ""
    return f" at commit {record['commit'][:9]}{changed}"


def _git(*args: str, folder: Path) -> str | None:
    """Return what a git command prints in a folder, None where it fails."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, with family and model where the name alone says little."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = info.read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def cpu() -> dict[str, Any]:
    """Return name, vector instructions and number of cores of the processor."""
    import torch

    return {
        "name": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": num_cores(),
    }


def machine() -> dict[str, Any]:
    """Return the processor as `cpu` does, and the name of the accelerator, None without one."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    name = None
    if device is not None:
        name = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    return {**cpu(), "accelerator": name}
