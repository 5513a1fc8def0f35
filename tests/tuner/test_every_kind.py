"""The table of what every kind of layer does: outputs and gradients are those of plain autograd
(R1) whatever PEFT does with its adapters, the base comes back bit for bit (R2), and what is kept
for the backward pass is the trained columns of x.

tests/residency/twin.py has the kinds; random walks over them do the same in any order. The files of
single layers have what no other layer does.
"""

import copy
import gc
import json
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pacatune import PacaConfig
from tests.ops.twin import bytes_kept
from tests.releases import compiles_whole, needs
from tests.residency.twin import ALL, OWN_FORWARDS, Net, Twin, targets_of, twin_of
from tests.tuner.nets import evaluate

pytestmark = [
    # Dynamo itself instantiates autograd Functions while it traces them.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Merging into a quantised model:UserWarning"),
    # torch's own remark on the plain convolution.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]
FLOATING = [kind for kind in ALL if not kind.startswith("quantised")]
LAYERS = [kind for kind in FLOATING if "experts" not in kind]
ONE_INPUT = [kind for kind in ALL if "experts" not in kind]
every_kind = pytest.mark.parametrize("kind", ALL)
floating = pytest.mark.parametrize("kind", FLOATING)


def make(kind: str) -> Twin:
    """Return a layer in the finest dtype that its kind takes."""
    return twin_of(kind, torch.float64 if kind in FLOATING else torch.float32)


def base_of(twin: Twin) -> nn.Module:
    return Net(copy.deepcopy(twin.plain), twin.kind.call)


def add(twin: Twin, name: str = "other", **options) -> None:
    """Add an adapter of two columns that does something."""
    options = {"r": 2, "random_seed": 5, "init_weights": False, **targets_of(twin.kind), **options}
    twin.model.add_adapter(name, PacaConfig(**options))


@every_kind
def test_trained(kind: str) -> None:
    twin = make(kind)
    optimizer = torch.optim.AdamW(twin.trained(), lr=0.05)
    for _ in range(4):
        twin.check()
        twin.model(twin.inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    twin.check()
    twin.check_base()


@every_kind
def test_untrained_in_16_bits_is_the_base(kind: str) -> None:
    twin = twin_of(kind, torch.bfloat16)
    twin.trained()[0].data.zero_()
    x = twin.inputs()
    assert torch.equal(twin.model.train()(x), base_of(twin).train()(x))
    assert torch.equal(evaluate(twin.model, x), evaluate(base_of(twin), x))


@every_kind
def test_columns_that_it_does_not_have(kind: str) -> None:
    """A GPU would write them beside the weight."""
    twin = make(kind)
    name = f"base_model.model.{twin.key}.paca_indices.default"
    for place, column in ((0, -1), (-1, twin.layer.in_features)):
        indices = twin.layer.paca_indices["default"].clone()
        indices[place] = column
        for assign in (False, True):
            with pytest.raises(ValueError, match=f"`paca_indices` holds {column} at position"):
                twin.model.load_state_dict({name: indices}, strict=False, assign=assign)
        twin.check()
    twin.check_base()


@compiles_whole
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    twin = make(kind)
    x = twin.kind.inputs(70)
    twin.inputs = lambda: x.double() if x.is_floating_point() else x  # one shape
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.model, fullgraph=True, backend=counter)
    for _ in range(3):
        twin.check(compiled)
        for parameter in twin.trained():
            parameter.data.mul_(-0.5)
    assert counter.frame_count == 1


# The ids of an embedding are all that it keeps; ops/test_convolution.py has uneven "same".
@pytest.mark.parametrize(
    "kind",
    [k for k in ALL if not k.startswith("Embedding") and k not in ("Conv2d, same", *OWN_FORWARDS)],
)
def test_what_is_kept_for_the_backward_pass(kind: str) -> None:
    """The trained columns of x as they meet the weight; of x itself torch's padding may be."""
    twin, results, sizes = make(kind), [], []
    x = twin.kind.inputs(70).to(twin.dtype).requires_grad_()
    base = twin.layer.get_base_layer()
    if "experts" in kind:
        num_rows = 2 * len(x)
    else:
        meets = twin.layer._padded(x)[0] if hasattr(twin.layer, "_padded") else x
        num_rows = meets.numel() // twin.layer.in_features

    def run() -> None:
        passing = x * 1
        results.append((weakref.ref(passing), twin.model(passing)))

    for is_trained in (False, True):
        for parameter in twin.trained():
            parameter.requires_grad_(is_trained)
        own = [*twin.model.parameters(), *twin.model.buffers()]
        sizes.append(bytes_kept(run, own))
    num_kept = len(twin.update("default").indices)
    if kind == "Conv1D, mixed":  # by autograd, which keeps x A^T as well
        num_kept += 3
    assert sizes[1] - sizes[0] == num_rows * num_kept * x.itemsize
    gc.collect()
    # Nor beside autograd's own saved tensors, as bitsandbytes' 8-bit function does.
    is_padded = getattr(base, "padding_mode", None) in ("reflect", "replicate")
    assert [alive() is not None for alive, _ in results] == [is_padded] * 2


@compiles_whole
def test_a_graph_of_a_convolution_keeps_its_kernel_besides() -> None:
    torch._dynamo.reset()
    twin = make("Conv2d, groups")
    x = twin.kind.inputs(70).double().requires_grad_()
    compiled = torch.compile(twin.model, fullgraph=True, backend="aot_eager")
    kernel = twin.weight_of(twin.plain).nbytes + 2 * 3 * 8  # indices, twice
    num_kept = bytes_kept(lambda: compiled(x), [x, *twin.model.parameters(), *twin.model.buffers()])
    assert num_kept <= x.numel() * 3 // twin.layer.in_features * x.itemsize + kernel


@every_kind
def test_checkpointed_and_run_twice_before_a_backward(kind: str) -> None:
    twin, x = make(kind), make(kind).inputs()
    want, values = twin.expected(x, ["default"])
    gradients = torch.autograd.grad(want.square().sum(), values)
    is_differentiable = x.is_floating_point()
    for use_reentrant in (False, True) if is_differentiable else (False,):
        x.requires_grad_(is_differentiable)
        outputs = [checkpoint(twin.model, x, use_reentrant=use_reentrant) for _ in range(2)]
        twin.model.zero_grad()
        sum(y.square().sum() for y in outputs).backward()
        for parameter, gradient in zip(twin.trained(), gradients, strict=True):
            twin.close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_kind
def test_merged_disabled_and_unloaded(kind: str, dtype: torch.dtype) -> None:
    twin = twin_of(kind, dtype if kind in FLOATING else torch.float32)
    x = twin.inputs()
    twin.model.eval()
    for _ in range(3):
        twin.model.merge_adapter(safe_merge=True)
        twin.check()
        twin.model.unmerge_adapter()
        twin.check_base()
    dense, plain = twin.layer.get_delta_weight("default"), twin.weight_of(twin.plain)
    twin.model.merge_adapter()
    if kind in FLOATING:
        twin.close(twin.weight_of(twin.layer.get_base_layer()), plain + dense.to(dtype))
    with twin.model.disable_adapter():
        assert torch.equal(evaluate(twin.model, x), evaluate(base_of(twin), x))
        twin.check_base()
    twin.check()
    merged = copy.deepcopy(twin.model).merge_and_unload()
    modules = [(name, type(module)) for name, module in base_of(twin).named_modules()]
    assert [(name, type(module)) for name, module in merged.named_modules()] == modules
    if kind in FLOATING:
        twin.close(evaluate(merged, x), twin.expected(x, ["default"])[0])
    before = base_of(twin).state_dict()
    after = twin.model.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_unmerging_a_quantised_layer_leaves_its_mode() -> None:
    """bitsandbytes' 8-bit kernel rounds otherwise in training."""
    twin = make("quantised, int8")
    twin.model.merge_adapter()
    twin.model.eval()
    twin.model.unmerge_adapter()
    assert twin.layer.get_base_layer().training is False


@floating
def test_a_weight_that_another_module_has_too(kind: str) -> None:
    """Merging must not change the other module."""
    twin = make(kind)
    base, parameter = base_of(twin), twin.kind.parameter
    base.other = copy.deepcopy(base.layer)
    shared = getattr(base.layer, parameter)
    setattr(base.other, parameter, shared)
    model = get_peft_model(base, PacaConfig(r=3, init_weights=False, **targets_of(twin.kind)))
    x, before = twin.inputs(), shared.clone()
    want = model(x)
    model.merge_adapter()
    assert torch.equal(shared, before)
    twin.close(model(x), want)
    model.unmerge_adapter()
    twin.model = model
    assert getattr(twin.layer.get_base_layer(), parameter) is shared


@every_kind
def test_two_at_once_and_their_sum(kind: str) -> None:
    twin = make(kind)
    add(twin)
    twin.model.base_model.set_adapter(["default", "other"])
    twin.check()
    twin.model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    parts = (twin.layer.get_delta_weight(name) for name in ("default", "other"))
    want = sum(weight * part for weight, part in zip((0.5, -2.0), parts, strict=True))
    torch.testing.assert_close(twin.layer.get_delta_weight("sum"), want)
    twin.model.set_adapter("sum")
    twin.check()
    twin.check_base()


@pytest.mark.parametrize("kind", ONE_INPUT)
def test_rows_of_different_adapters(kind: str) -> None:
    twin = make(kind)
    add(twin)
    x = twin.kind.inputs(4)
    x = x.to(twin.dtype) if x.is_floating_point() else x
    names = ["other", "__base__", "default", "other"][: len(x)]
    found = evaluate(twin.model, x, adapter_names=names)
    for row, name in enumerate(names):
        want = twin.expected(x, [] if name == "__base__" else [name])[0]
        twin.close(found[row], want[row])


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ONE_INPUT])
def test_rows_of_different_adapters_are_refused(kind: str) -> None:
    """Experts see single tokens, not the rows of the batch."""
    twin = make(kind)
    with pytest.raises(ValueError, match="`adapter_names` to a model with adapted experts"):
        evaluate(twin.model, twin.inputs(), adapter_names=["default", "__base__", "default"])


@every_kind
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    """The columns come from the file and not from the seed."""
    twin = make(kind)
    twin.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key, layout = f"base_model.model.{twin.key}", twin.layer.layout
    names = ["paca_delta", "paca_indices", *(["paca_mix"] if twin.kind.channels else [])]
    assert set(tensors) == {f"{key}.{name}" for name in names}
    if not twin.kind.channels:
        assert tensors[f"{key}.paca_delta"].shape == layout.delta_shape(3)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "random_seed": 999}))
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    loaded = PeftModel.from_pretrained(base_of(twin), tmp_path, **options)
    x = twin.inputs()
    assert torch.equal(evaluate(loaded, x), evaluate(twin.model, x))


@floating
def test_hooks_on_the_base_layer_run(kind: str) -> None:
    twin, seen = make(kind), []
    twin.layer.get_base_layer().register_forward_hook(lambda *call: seen.append(call))
    twin.check()
    assert len(seen) == 1


@pytest.mark.parametrize("kind", [kind for kind in FLOATING if kind not in OWN_FORWARDS])
def test_offloaded(kind: str) -> None:
    from accelerate import cpu_offload

    twin = make(kind)
    x = twin.inputs()
    want = twin.expected(x, ["default"])[0]
    cpu_offload(twin.model, execution_device=torch.device("cpu"))
    assert getattr(twin.layer.get_base_layer(), twin.kind.parameter).is_meta
    twin.close(evaluate(twin.model, x), want)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "Conv2d, groups"])
def test_biases_of_adapted_layers_are_trained(kind: str, tmp_path) -> None:
    twin = make(kind)
    options = {"r": 2, "bias": "paca_only", "init_weights": False, **targets_of(twin.kind)}
    model = get_peft_model(base_of(twin), PacaConfig(**options), autocast_adapter_dtype=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layer = "base_model.model.layer"
    assert set(trained) == {f"{layer}.base_layer.bias", f"{layer}.paca_delta.default.weight"}
    x = twin.inputs()
    y = model(x)
    y.sum().backward()
    bias = trained[f"{layer}.base_layer.bias"]
    assert (bias.grad == y.numel() / len(bias)).all()
    bias.data.add_(1)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": False}
    loaded = PeftModel.from_pretrained(base_of(twin), tmp_path, **options)
    assert torch.equal(evaluate(loaded, x), evaluate(model, x))


@needs("peft", "0.19")
@every_kind
def test_linear_layers_alone_become_a_lora_of_pefts(kind: str) -> None:
    """By PEFT's `convert_to_lora`; `pacatune export` writes the others, too."""
    is_linear = kind.removesuffix(", mixed") in ("Linear", "Conv1D") or "quantised" in kind
    assert make(kind).layer.supports_lora_conversion() == is_linear
