import re
import subprocess
import sys
from pathlib import Path

import pacatune
from pacatune.reports import provenance


def test_commit_of_this_checkout_and_of_none(tmp_path):
    root = Path(pacatune.__file__).parents[2]
    if (root / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", provenance.commit()["commit"])
        assert provenance.commit(root, "src")["commit"] == provenance.commit()["commit"]
        assert provenance.commit(root, "no-such-folder")["commit"] is None
    nothing = provenance.commit(tmp_path)
    assert nothing == {"commit": None, "is_modified": None}
    assert provenance.commit_text(nothing) == ""
    assert (
        provenance.commit_text({"commit": "0123456789", "is_modified": False})
        == " at commit 012345678"
    )
    changed = provenance.commit_text({"commit": "0123456789", "is_modified": True})
    assert changed == " at commit 012345678, with changes that were not committed,"


def test_reports_stand_on_files_alone():
    code = "from pacatune.reports import figures, provenance, rows"
    tail = "\nimport sys; print(*(n for n in sys.modules if n.startswith('pacatune.')))"

    def imported(code):
        command = [sys.executable, "-c", code + tail]
        return {*subprocess.check_output(command, text=True, timeout=120).split()}

    allowed = ("pacatune.reports", "pacatune.files", "pacatune._")
    others = imported(code) - imported("import pacatune")
    assert all(name.startswith(allowed) for name in others)
