"""The pytest plugin that runs PEFT's tests on one method.

Each test module is imported as PEFT wrote it; the lists of its `parametrize` marks that go over
PEFT methods are replaced by our cases, and tests on which nothing was replaced are deselected.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft_cases import replacement

SUITES = {
    "custom": "test_custom_models.py",
    "config": "test_config.py",
    "decoder": "test_decoder_models.py",
    "encdec": "test_encoder_decoder_models.py",
    "feature": "test_feature_extraction_models.py",
    "seqcls": "test_seq_classifier.py",
    "tokencls": "test_token_classification_qa.py",
    "params": "test_target_parameters.py",
    "quant": "test_quantization.py",
    "vision": "test_vision_models.py",
    "compile": "test_torch_compile.py",
}
# tests that no local cache can serve (they download into a fresh folder)
HUB_ONLY = {"test_from_pretrained_cache_dir"}


def _suite_of(path):
    return next((suite for suite, name in SUITES.items() if Path(path).name == name), None)


def _inject(module, suite):
    """Replace the parametrize marks of a module's tests; remember which tests were touched."""
    touched = set()
    todo = [(None, vars(module))]
    for name, obj in list(vars(module).items()):
        if isinstance(obj, type) and name.startswith("Test") and obj.__module__ == module.__name__:
            todo.append((name, vars(obj)))
    for owner, namespace in todo:
        for name, func in list(namespace.items()):
            marks = getattr(func, "pytestmark", None)
            if not name.startswith("test") or not marks or not callable(func):
                continue
            new = [_replaced(mark, suite) for mark in marks]
            if any(one is not other for one, other in zip(new, marks, strict=True)):
                func.pytestmark = new
                touched.add((owner, name))
    module.__peft_conformance__ = touched


def _replaced(mark, suite):
    """Return the mark, or one with our cases in its place."""
    if mark.name != "parametrize":
        return mark
    names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
    names = [name.strip() for name in names]
    values = replacement(suite, names, mark.args[1])
    if values is None:
        return mark
    kwargs = {k: v for k, v in mark.kwargs.items() if k != "ids" or callable(v)}
    return pytest.mark.parametrize(names if len(names) > 1 else names[0], values, **kwargs).mark


class _AlwaysCached(dict):
    """Stands for PEFT's record of models seen before: hub_online_once then stays offline."""

    def __contains__(self, key):
        return True

    def get(self, key, default=None):
        return 1

    __getitem__ = get

    def __delitem__(self, key):
        pass


def _patch_testing_utils(package):
    utils = importlib.import_module(f"{package}.testing_utils")
    if getattr(utils, "__peft_conformance__", False):
        return
    utils.__peft_conformance__ = True
    utils._HUB_MODEL_ACCESSES = _AlwaysCached()

    def quotes():
        from datasets import Dataset, DatasetDict

        rows = [f"w{i % 50} w{(3 * i) % 50} w{(7 * i) % 50} w{(11 * i) % 50}" for i in range(64)]
        data = Dataset.from_dict({"quote": rows, "author": ["a"] * 64, "tags": [["t"]] * 64})
        return DatasetDict({"train": data})

    def cat():
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        return Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8))

    utils.load_dataset_english_quotes = quotes
    utils.load_cat_image = cat


def _open_guards(module, package):
    """Lift guards of the suite that were not meant for our method.

    `check_beft_config` is to skip Llama and Gemma3 for BEFT only, but tests
    `isinstance(a class, BeftConfig)`, so that no method's merging is ever tried on them.
    `_skip_if_conv1d_not_supported` goes by a list of classes, and in PEFT 0.18 a table says how the
    names of a method's parameters begin.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from pacatune import PacaConfig

    if hasattr(module, "check_beft_config"):
        module.check_beft_config = lambda *args: None
    if hasattr(module, "PREFIXES"):
        module.PREFIXES[PacaConfig] = PEFT_TYPE_TO_PREFIX_MAPPING[PacaConfig().peft_type]
    common = importlib.import_module(f"{package}.testing_common")
    common._skip_if_conv1d_not_supported = lambda *args: None


# Tests that PEFT opens only to a hard-coded class (LoRA); opened to ours for the test's duration.
MIXED_BATCH_TESTS = {"test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"}
# FSDP's model adds the columns' share to the output, the one it is compared with has it in its
# weight: sums in two orders, of values up to 10, which the default tolerance of 1e-5 of logarithms
# near 0 does not allow on every processor.
ROUNDED_TEST = "test_save_load_roundtrip_fsdp_wrapped"
BIAS_TEST = "test_adding_multiple_adapters_with_bias_raises"  # with bias="all"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    from pacatune import PacaConfig

    with contextlib.ExitStack() as stack:
        if item.originalname == ROUNDED_TEST:
            allow = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
            stack.enter_context(mock.patch.object(torch, "allclose", allow))
        if item.originalname in MIXED_BATCH_TESTS:
            for module in (item.module, sys.modules[f"{item.module.__package__}.testing_common"]):
                stack.enter_context(mock.patch.object(module, "LoraConfig", PacaConfig))
        yield


def pytest_configure(config):
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: marker of PEFT's test-suite")


def pytest_pycollect_makemodule(module_path, parent):
    suite = _suite_of(module_path)
    if suite is None:
        return None

    class InjectedModule(pytest.Module):
        def _getobj(self):
            package = module_path.parent.name
            sys.path.insert(0, str(module_path.parent.parent))
            try:
                _patch_testing_utils(package)
                module = super()._getobj()
                _open_guards(module, package)
            finally:
                sys.path.pop(0)
            _inject(module, suite)
            return module

    return InjectedModule.from_parent(parent, path=module_path)


def _skipped(item):
    """Return why a test has nothing to say of PaCA here, if so."""
    is_mixed = item.originalname in MIXED_BATCH_TESTS
    if item.originalname in HUB_ONLY:
        return "downloads from the Hub"
    if is_mixed and "OPT" in item.nodeid:
        return "OPT's MLP sees tokens, no batch"
    if is_mixed and _suite_of(item.path) == "params":
        return "experts see tokens, no batch"
    if item.originalname == BIAS_TEST and "GptOss" in item.nodeid:
        return "PEFT would not save experts' biases"
    return None


def pytest_collection_modifyitems(config, items):
    keep, drop = [], []
    for item in items:
        owner = item.cls.__name__ if item.cls is not None else None
        is_ours = (owner, item.originalname) in item.module.__peft_conformance__
        (keep if is_ours else drop).append(item)
        if reason := _skipped(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=drop)
    items[:] = keep
