"""`import pacatune` makes its methods known to PEFT, whatever was imported before it or is after.

Each case is a process of its own. What all of them import first, and PEFT is not, is imported once.
"""

import subprocess
import sys

import pytest

from tests.adapters.fixtures import save_adapter
from tests.forks import run_cases

# They look PEFT up (`importlib.util.find_spec`) without importing it; the others only take long.
OTHERS = "import transformers.modeling_utils, datasets, psutil, torch._inductor.compile_fx"
PRINT = """
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as methods
print(methods["PACA"].__module__)
"""
KNOWN = "pacatune.tuner.model"

LOAD = """
import torch
from transformers import AutoModelForCausalLM, pipeline
base = AutoModelForCausalLM.from_pretrained({base!r})
plain = base(torch.tensor([[5, 6, 7]])).logits
base.load_adapter({adapter!r})
change = (base(torch.tensor([[5, 6, 7]])).logits - plain).abs().max()
print(bool(change > 1e-3), pipeline("text-generation", {adapter!r}).model._hf_peft_config_loaded)
"""

MECHANICS = """
import importlib, importlib.util, sys

spec = importlib.util.find_spec("peft")  # and more than once
assert importlib.util.find_spec("peft").origin == spec.origin
assert spec.loader.get_filename("peft") == spec.origin and spec.loader.is_package("peft")
assert "peft" not in sys.modules
hooks = [finder for finder in sys.meta_path if type(finder).__module__ == "pacatune._peft_hook"]
importlib.reload(sys.modules["pacatune"])
assert len(hooks) == 1

sys.modules["peft"] = None  # how a program forbids an import
importlib.reload(sys.modules["pacatune"])
del sys.modules["peft"]

import peft
assert not set(hooks) & set(sys.meta_path)
assert type(peft.__loader__) is type(peft.__spec__.loader) is type(peft.config.__loader__)
importlib.reload(peft), importlib.reload(sys.modules["pacatune"])
"""

FAILS_AT_FIRST = """
import sys, pytest
from importlib.abc import MetaPathFinder

class Broken(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname == "peft.mapping":
            sys.meta_path.remove(self)
            raise ImportError("a broken disk")

sys.meta_path.insert(0, Broken())
with pytest.raises(ImportError, match="a broken disk"):
    import peft
"""

OTHER_HOOK = """
import importlib.util, sys
from importlib.abc import MetaPathFinder

class Hook(MetaPathFinder):  # asks all finders again, as import hooks of tracers do
    depth = 0

    def find_spec(self, fullname, path, target=None):
        if fullname == "peft" and self.depth < 6:
            self.depth += 1
            found = importlib.util.find_spec(fullname)
            self.depth -= 1
            return found

sys.meta_path.insert(0, Hook())
sys.meta_path.append(Hook())
"""

THREADS = """
import importlib, importlib.util
from concurrent.futures import ThreadPoolExecutor

def look_up():
    for _ in range(200):
        importlib.util.find_spec("peft")

steps = [look_up, look_up] + [lambda: importlib.import_module("pacatune").PacaConfig] * 2
steps += [lambda: importlib.import_module("peft")] * 2 + [look_up]
with ThreadPoolExecutor(len(steps)) as pool:
    for started in [pool.submit(step) for step in steps]:
        started.result()
"""

NEWER_PEFT = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Newer(MetaPathFinder):  # a PEFT that has a PaCA of its own when its import is done
    def find_spec(self, fullname, path, target=None):
        if fullname != "peft":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            from tests.tuner import peft_paca
            peft_paca.install()

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Newer())
import pacatune
from peft import PacaConfig
assert PacaConfig is pacatune.PacaConfig
"""

OURS_FIRST = {
    "SFTTrainer": "from trl import SFTTrainer",  # which imports Trainer from transformers first
    "diffusers": "from diffusers import UNet2DConditionModel",
    "sentence_transformers": "from sentence_transformers import SentenceTransformer",
    "load_adapter": LOAD,
    "a failure, and look-ups": FAILS_AT_FIRST + MECHANICS,
    "other hooks": OTHER_HOOK,
    "threads": THREADS,
}
OTHERS_FIRST = {
    "Trainer": "from transformers import Trainer; import pacatune",
    "ours": "import pacatune; from trl import SFTTrainer",
    "a PEFT with its own": NEWER_PEFT,
    "threads": THREADS,
}


def run_before_peft(first: str, cases: dict[str, str]) -> dict[str, str]:
    first += "\nimport sys; assert 'peft' not in sys.modules"
    printing = {name: code + "\n" + PRINT for name, code in cases.items()}
    return run_cases(first, printing, new=True)


@pytest.fixture(scope="module")
def after_ours(tiny_model_dir, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("orders") / "adapter"
    save_adapter(tiny_model_dir, adapter)
    load = LOAD.format(base=str(tiny_model_dir), adapter=str(adapter))
    return run_before_peft(f"import pacatune; {OTHERS}", {**OURS_FIRST, "load_adapter": load})


@pytest.fixture(scope="module")
def after_others():
    return run_before_peft(OTHERS, OTHERS_FIRST)


@pytest.mark.parametrize("name", OURS_FIRST)
def test_registers_where_ours_is_imported_first(after_ours, name) -> None:
    if "No module named 'sentence_transformers'" in after_ours[name]:
        pytest.skip("sentence_transformers is not installed")
    done = "True True\n" if name == "load_adapter" else ""
    assert after_ours[name] == done + KNOWN


@pytest.mark.parametrize("name", OTHERS_FIRST)
def test_registers_where_others_are_imported_first(after_others, name) -> None:
    assert after_others[name] == KNOWN


def test_import_is_light() -> None:
    code = (
        "import sys, pacatune; print({'torch', 'peft', 'transformers', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
