"""A traced model contains the adapter, or cannot be saved; whatever is done to the model after."""

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pacatune.residency.weight
from tests.residency.net import (
    adapt,
    assert_base,
    assert_close,
    check,
    deltas,
    evaluate,
    expected,
)
from tests.residency.twin import KINDS, twin_of
from tests.tuner.nets import Reference

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"
)


is_written = pytest.mark.parametrize("is_written", [False, True], ids=["pretrained", "written"])


def trace(model: nn.Module, x: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.base_model.model, x, check_trace=False)


@is_written
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, is_written):
    twin = twin_of(kind)
    x = twin.inputs()
    want = twin.expected(x, twin.active)[0]
    if is_written:
        twin.model(x)
    traced = trace(twin.model, x)
    twin.close(traced(x), want)
    twin.check()  # writes columns, where nobody else could see them
    twin.close(traced(x), want)
    twin.model.state_dict()
    twin.close(traced(x), want)
    buffer = io.BytesIO()
    if "experts" in kind or "int8" in kind:
        with pytest.raises(RuntimeError, match="Could not export Python function call"):
            torch.jit.save(traced, buffer)
        return
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    twin.close(torch.jit.load(buffer)(x), want)


def test_while_the_model_is_trained(base, model, x):
    """The trace holds the model's own tensors: its answers are those of the trained model."""
    traced = trace(model, x)
    optimizer = torch.optim.SGD(deltas(model), lr=0.01)
    for _ in range(3):
        check(base, model, x)
        assert_close(traced(x), expected(base, model, x)[0])
        optimizer.step()
        assert_close(traced(x), expected(base, model, x)[0])
    assert_base(base, model)


def test_second_derivatives_come_from_torch_func(base, model, x):
    twin = Reference(base, model)

    def norm_of_gradient(net: nn.Module) -> Callable[[Tensor], Tensor]:
        gradient = torch.func.grad(lambda x: net(x).square().sum())
        return lambda x: gradient(x).square().sum()

    model(x).sum().backward()  # writes
    ours, theirs = (torch.func.grad(norm_of_gradient(net))(x) for net in (model, twin))
    torch.testing.assert_close(ours, theirs)
    tangents = [torch.func.jvp(net, (x,), (x.cos(),))[1] for net in (model, twin)]
    torch.testing.assert_close(*tangents)
    with pytest.raises(RuntimeError, match=r"Use torch\.func's transforms"):
        torch.autograd.grad(model(x).sum(), deltas(model), create_graph=True)


@is_written
@pytest.mark.parametrize("is_exported", [False, True], ids=["make_fx", "torch.export"])
def test_graphs(is_exported, is_written, base, model, x):
    want, net = expected(base, model, x)[0], model.base_model.model
    if is_written:
        model(x)
    if is_exported:
        graph = torch.export.export(net, (x,), strict=False).module()
    else:
        graph = make_fx(lambda x: net(x))(x)
    for then in (lambda: check(base, model, x), lambda: list(model.parameters()), lambda: None):
        assert_close(graph(x), want)
        then()


def test_torch_export_that_would_leave_no_note(model, x):
    with pytest.raises(Exception, match=r"export the model with `strict=False`|Observed exception"):
        torch.export.export(model.base_model.model, (x,), strict=True)


def test_onnx(base, x, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    base.float()
    x = x.float()
    model = adapt(base)
    want = expected(base, model, x)[0]
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = tmp_path / "model.onnx"
        torch.onnx.export(model.base_model.model, (x,), path, dynamo=False)
    graph = onnx.load(path)
    found = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), want, atol=1e-5, rtol=1e-5)


class TestCapture:
    """CUDA graphs read the weight's memory at every replay; on a CPU, as if one were recorded."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_capturing = False
        monkeypatch.setattr(pacatune.residency.weight, "is_on_gpu", lambda weight: True)
        monkeypatch.setattr(pacatune.residency.weight, "_is_capturing", lambda: self.is_capturing)

    def test_the_pretrained_weight_is_captured(self, base, model, x, writes):
        self.is_capturing = True
        check(base, model, x)
        evaluate(model, x)
        self.is_capturing = False
        check(base, model, x)  # the graph may be replayed at any time from now on
        assert not writes

    def test_columns_in_the_weight_are_refused(self, base, model, x):
        check(base, model, x)
        self.is_capturing = True
        with pytest.raises(RuntimeError, match=r"CUDA graph.*Call `model.zero_grad\(\)` before"):
            model(x)
        self.is_capturing = False
        model.zero_grad()
        self.is_capturing = True
        check(base, model, x)
        assert_base(base, model)
