"""A name that is nowhere is answered at once, by the right option."""

import huggingface_hub
import pytest

from pacatune.adapters.base import load_base_config, load_tokenizer
from pacatune.data.read import read_rows
from pacatune.hub import check_on_hub
from pacatune.pretrained import find_model

MODEL = r"\('nosuch/model'\) is neither a file or folder here nor a model of the hub that can be re"


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: find_model("nosuch/model"), f"`model.path` {MODEL}"),
        (lambda: load_base_config("nosuch/model"), f"`model` {MODEL}"),
        (lambda: load_tokenizer("nosuch/model"), f"`model` {MODEL}"),
        (lambda: list(read_rows("no/data")), r"`data.path` .* data set of the hub"),
        (lambda: list(read_rows("no/data", option="data.eval_path")), r"`data.eval_path` \('no/da"),
    ],
)
@pytest.mark.parametrize("problem", ["offline", "unreachable"])
def test_name_that_is_nowhere(load, message, problem, monkeypatch):
    asked = []
    if problem == "unreachable":

        def repo_info(self, *args, **options):
            asked.append(options["timeout"])
            raise ConnectionError("no network")

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    with pytest.raises(FileNotFoundError, match=message):
        load()
    assert asked == ([10] if problem == "unreachable" else [])  # never a second time


def test_name_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="OfflineModeIsEnabled"):
        check_on_hub("owner/cached", "model.path")
    (tmp_path / "models--owner--cached").mkdir()
    check_on_hub("owner/cached", "model.path")
