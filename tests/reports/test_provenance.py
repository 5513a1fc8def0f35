import re
import subprocess
import sys
from pathlib import Path

import pacatune
from pacatune.reports.provenance import (
    Noise,
    commit,
    commit_text,
    cpu,
    package_version,
    versions,
    versions_text,
)


def test_versions_name_what_is_installed():
    found = versions("trl", "no-such-package")
    assert list(found) == ["python", "pacatune", "torch", "transformers", "peft", "trl"]
    assert versions_text({"torch": "2", "peft": "1"}) == "torch 2, peft 1"
    assert package_version("no-such-package") is None


def test_commit_of_this_checkout_and_of_none(tmp_path):
    root = Path(pacatune.__file__).parents[2]
    if (root / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", commit()["commit"])
        assert commit(root, "src")["commit"] == commit()["commit"]
        assert commit(root, "no-such-folder")["commit"] is None
    nothing = commit(tmp_path)
    assert nothing == {"commit": None, "is_modified": None}
    assert commit_text(nothing) == ""
    assert commit_text({"commit": "0123456789", "is_modified": False}) == " at commit 012345678"
    changed = commit_text({"commit": "0123456789", "is_modified": True})
    assert changed == " at commit 012345678, with changes that were not committed,"


def test_the_machine():
    assert cpu()["num_cores"] >= 1
    noise = Noise().to_dict()
    assert len(noise["load_average"]) == 2
    assert "num_cores_of_others" in noise


def test_reports_stand_on_files_alone():
    code = (
        "import sys\n"
        "from pacatune.reports import figures, provenance, rows\n"
        "ours = {n for n in sys.modules if n.startswith('pacatune.')}\n"
        "allowed = ('pacatune.reports', 'pacatune.files', 'pacatune._')\n"
        "print(sorted(n for n in ours if not n.startswith(allowed)))\n"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    before = subprocess.run(
        [sys.executable, "-c", code.replace("from pacatune.reports import", "import pacatune #")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert alone.stdout == before.stdout
