"""The workflows of .github run what the Makefile has, on every Python that the package supports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pacatune.training.config_file import load_yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JOBS = {
    name: job
    for path in WORKFLOWS
    for name, job in load_yaml(path.read_text(encoding="utf-8"))["jobs"].items()
}


def lines(job):
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_workflows_are_what_github_takes():
    pytest.importorskip("check_jsonschema", reason="`make test` installs it")
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_jobs_call_targets_that_there_are():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    called = {
        line.split()[1] for job in JOBS.values() for line in lines(job) if line.startswith("make ")
    }
    assert {"lint", "test", "docs", "test-docs", "conformance", "dist"} <= called <= targets


def test_every_python_from_the_oldest_is_tested():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = JOBS["test"]["strategy"]["matrix"]["python-version"]
    assert package["requires-python"] == f">={pythons[0]}"
    assert pythons == [f"3.{minor}" for minor in range(11, 15)]


def test_only_publishing_may_more_than_read():
    for path in WORKFLOWS:
        assert load_yaml(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
    allowed = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert allowed == {"publish": {"id-token": "write"}}
    assert JOBS["publish"]["environment"] == "pypi"


def test_a_tag_names_the_version(tmp_path):
    (script,) = (
        step
        for step in JOBS["build"]["steps"]
        if step.get("env") == {"TAG": "${{ github.ref_name }}"}
    )
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text)
    version = tomllib.loads(text)["project"]["version"]
    for tag, is_right in ((f"v{version}", True), (f"v{version}1", False), ("v", False)):
        done = subprocess.run(["bash", "-e", "-c", script["run"]], cwd=tmp_path, env={"TAG": tag})
        assert (done.returncode == 0) == is_right, tag
