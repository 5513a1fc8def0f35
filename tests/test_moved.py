"""Tests of `pacatune._moved`: imports by old names."""

import importlib
import sys
import warnings

import pytest

from pacatune._moved import MOVED
from tests.forks import run_python


@pytest.mark.parametrize("old", [old for old, new in MOVED.items() if isinstance(new, str)])
def test_gives_the_module_at_its_new_place(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(old.rpartition(".")[0])
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__

    with pytest.warns(DeprecationWarning, match=rf"^{old} is now {MOVED[old]}\.$"):
        module = importlib.import_module(old)

    assert module is new
    assert module.__spec__ is spec
    assert module.__name__ == MOVED[old]


def test_modules_below_are_found_by_old_names_too():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from pacatune.functional.linear import paca_linear as old\n"
        "from pacatune.ops.linear import paca_linear as new\n"
        "from pacatune.reference import paca_linear as twin\n"
        "from pacatune.baselines import MosLoraConfig\n"
        "import pacatune\n"
        "assert old is new and twin.__module__ == 'pacatune.ops.reference'\n"
        "assert MosLoraConfig is pacatune.MosLoraConfig\n"
        "assert sys.modules['pacatune.functional.linear'] is sys.modules['pacatune.ops.linear']\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_names_of_modules_that_were_taken_apart_are_found_in_their_parts():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pacatune.memory.setting import Setting\n"
        "from pacatune.memory.estimate import estimate_memory, find_max\n"
        "from pacatune.memory.gpus import gpu_bytes, parse_bytes\n"
        "from pacatune.memory import SavedBytes, peak_process_bytes, reset_peak_process_bytes\n"
        "from pacatune.memory import gpus, plot\n"
        "import pacatune.bench.config, pacatune.bench.saved\n"
        "from pacatune.bench import BenchConfig, llama_values, load_values, parse_shape, METHODS\n"
        "from pacatune.bench import Setting as MicroBatch, run\n"
        "from pacatune.bench.methods import METHODS as same, adapt, check_methods\n"
        "from pacatune.bench.running import run as also\n"
        "from pacatune.measure import bench, counters, device, setting\n"
        "assert (Setting, MicroBatch) == (setting.Setting, setting.MicroBatch)\n"
        "assert pacatune.bench.config.Setting is setting.MicroBatch\n"
        "assert BenchConfig is setting.BenchConfig is pacatune.bench.config.BenchConfig\n"
        "from pacatune.bench.device import choose_device, synchronize\n"
        "assert run is also is bench.run and METHODS is same\n"
        "assert SavedBytes is counters.SavedBytes is pacatune.bench.saved.SavedByLayer\n"
        "assert gpus is device and plot.save_plot\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_not_found_in_the_parts(monkeypatch):
    for old in [name for name in sys.modules if name.startswith("pacatune.memory")]:
        monkeypatch.delitem(sys.modules, old)
    with (
        pytest.warns(DeprecationWarning, match=r"memory is now pacatune\.measure\.counters and"),
        pytest.raises(ImportError, match=r"cannot import name 'Nothing' from 'pacatune\.memory'"),
    ):
        from pacatune.memory import Nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"pacatune\.memory\.nothing"):
        importlib.import_module("pacatune.memory.nothing")


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"pacatune\.functionals"):
        importlib.import_module("pacatune.functionals")
    with (
        pytest.warns(DeprecationWarning, match="is now pacatune"),
        pytest.raises(ModuleNotFoundError, match=r"pacatune\.ops\.nothing"),
    ):
        importlib.import_module("pacatune.functional.nothing")
