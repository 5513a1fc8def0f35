"""Lean models of every family: gradients, bytes, and no trace left."""

import json

import pytest
import torch

from pacatune import lean
from tests.lean.models import (
    ADAPTED,
    AS_KNOWN,
    adapt,
    assert_close_to_exact,
    build,
    classes,
    exact_gradients,
    gradients,
    make_batch,
)

# What `enable` finds in each, two layers deep.
DECODER = {"attention": 2, "gated_mlp": 2, "norm": 5, "loss": 1}
FOUND = dict.fromkeys(AS_KNOWN, DECODER) | {
    "Qwen 3": DECODER | {"norm": 9},
    "Gemma 2": {"gated_mlp": 2, "norm": 9, "loss": 1},
    "Gemma 3": DECODER | {"norm": 13},
    "OLMo 2": DECODER | {"norm": 9},
    "DINOv2, SwiGLU": {"gated_mlp": 2},
    "T5": {"norm": 12, "loss": 1},
    "BERT": {},
    "ViT": {},
    "DINOv2": {},
}
ALREADY = {"BERT": 5, "ViT": 5, "DINOv2": 5, "DINOv2, SwiGLU": 5}
LEFT = {
    "Gemma 2": "eager attention keeps the scores of all pairs of tokens; use sdpa, or for soft",
    "Qwen 2 MoE": "Qwen2MoeExperts: fused experts are not made lean",
}


@pytest.mark.parametrize("name", AS_KNOWN)
def test_report(name):
    model = build(name)
    report = lean.enable(model)
    assert json.loads(json.dumps(report.to_dict()))["made"] == report.made
    assert {kind: len(names) for kind, names in report.made.items()} == FOUND[name]
    assert all(model.get_submodule(place) for names in report.made.values() for place in names)
    assert len(report.already.get("norm", [])) == ALREADY.get(name, 0)
    if name in LEFT:
        ((reason, places),) = report.left.items()
        assert reason.startswith(LEFT[name])
        assert len(places) == 2
        assert f"not lean: {places[0]} and 1 more: {reason}" in str(report)
        lean.disable(model)
        with pytest.raises(ValueError, match="cannot be all lean, which 'require' asks for"):
            lean.enable(model, mode="require")
        assert not any(hasattr(kind, "plain_class") for kind in classes(model))
    else:
        assert report.left == {}
        assert lean.enable(model, mode="require") == report


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        *((name, "full", dtype) for name in AS_KNOWN for dtype in (torch.float32, torch.bfloat16)),
        *((name, "paca", torch.bfloat16) for name in ADAPTED),
        *((name, "lora", torch.float32) for name in ADAPTED),
    ],
)
def test_gradients(name, method, dtype):
    model, batch = build(name, dtype), make_batch(name, dtype)
    if method != "full":
        model = adapt(model, method)
    plain, plain_bytes = gradients(model, batch)
    before = classes(model), {n: x.clone() for n, x in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    lean.enable(model)
    ours, lean_bytes = gradients(model, batch)
    exact = exact_gradients(model, batch)
    lean.disable(model)
    again, again_bytes = gradients(model, batch)

    assert_close_to_exact(ours, plain, exact)
    if "gated_mlp" in FOUND[name]:
        assert lean_bytes < (0.9 if method == "full" else 1) * plain_bytes
    assert again_bytes == plain_bytes
    assert all(torch.equal(again[n], x) for n, x in plain.items())
    assert classes(model) == before[0]
    assert all(torch.equal(model.state_dict()[n], x) for n, x in before[1].items())
    if method == "full":
        assert [dict(vars(module)) for module in model.modules()] == attributes
