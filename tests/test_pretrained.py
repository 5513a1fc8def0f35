"""What cannot be loaded says whose it is; tests of what can are those of adapters and training."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from pacatune import pretrained
from pacatune.data.read import read_rows

MODEL = r"\('nosuch/model'\) is neither a file or folder here nor a model of the hub that can be re"


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: pretrained.load_config("nosuch/model"), f"`model.path` {MODEL}"),
        (lambda: list(read_rows("no/data")), r"`data.path` .* data set of the hub"),
        (lambda: list(read_rows("no/data", option="data.eval_path")), r"`data.eval_path` \('no/da"),
    ],
)
def test_name_that_is_nowhere(load, message):
    with pytest.raises(FileNotFoundError, match=message):
        load()


def response(status):
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "is_refused"),
    [
        (ConnectionError("no route"), True),
        (type("ConnectError", (Exception,), {})("no name"), True),
        (type("ConnectTimeout", (Exception,), {})("slow"), False),
        (RepositoryNotFoundError("404", response=response(404)), True),
        (GatedRepoError("403", response=response(403)), False),
        (HfHubHTTPError("503", response=response(503)), False),
        (None, False),
    ],
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_hub_is_asked_once(monkeypatch, tmp_path, kind, error, is_refused):
    """Its own clients ask for more than a minute; what is not clear is let through."""
    asked = []

    def repo_info(self, name, **options):
        asked.append((name, options["repo_type"], options["timeout"]))
        if error is not None:
            raise error

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = rf"`data.path` \('me/it'\) is neither a file .* \({type(error).__name__}\); check"
    expected = pytest.raises(FileNotFoundError, match=message) if is_refused else nullcontext()
    with expected:
        pretrained.refuse_absent("me/it", option="data.path", kind=kind)
    (tmp_path / f"{kind}s--me--it").mkdir()  # what is in the cache is not asked for
    pretrained.refuse_absent("me/it", option="data.path", kind=kind)
    assert asked == [("me/it", kind, 2)]


def test_other_errors_are_not_ours():
    with pytest.raises(ValueError, match=r"^something else$"), pretrained.explained("m"):
        raise ValueError("something else")


@pytest.mark.parametrize("kind", pretrained.QUANTIZATIONS)
def test_quantisation(kind):
    made = pretrained.bitsandbytes_config(kind, torch.bfloat16, double=False)
    assert made.load_in_8bit == (kind == "int8")
    if kind != "int8":
        assert made.bnb_4bit_quant_type == kind
        assert made.bnb_4bit_compute_dtype == torch.bfloat16
        assert not made.bnb_4bit_use_double_quant
