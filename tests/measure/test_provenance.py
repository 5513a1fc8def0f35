"""What a result says about where it comes from."""

from pacatune.measure import provenance
from pacatune.measure.provenance import Noise, commit, git, versions


def test_packages_that_are_not_there_are_left_out():
    assert {"python", "pacatune", "torch", "transformers", "peft"} <= set(versions())
    assert "no-such-package" not in versions("no-such-package")


def test_a_commit_is_that_of_the_package_or_none(tmp_path, monkeypatch):
    found = commit()
    assert found["commit"] is None or len(found["commit"]) == 40
    # An environment inside somebody's repository, which does not know the package.
    git("init", folder=tmp_path)
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(provenance, "_PACKAGE_FOLDER", tmp_path)
    assert commit() == {"commit": None, "is_modified": None}


def test_noise_is_what_others_did():
    noise = Noise().to_dict()
    assert len(noise["load_average"]) == 2
    assert noise["num_cores_of_others"] is None or noise["num_cores_of_others"] >= -1
