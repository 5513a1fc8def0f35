"""Strategies beyond the paper's, the sketch that two of them look at, budgets and sharing."""

import pytest
import torch
from peft import get_peft_model

from pacatune import PacaConfig
from pacatune.selection import (
    ColumnStatistics,
    allocate_ranks,
    choose_columns,
    collect_statistics,
    select_columns,
    share_columns,
)
from pacatune.strategies import SKETCH_ROWS, seed_for
from tests.conftest import build_model
from tests.selection.nets import build, loss_of, make_batches

META = torch.empty(4, 6, device="meta")


def sketch_of(matrix):
    """A sketch that is exact: the rows of a matrix (N, I) below each other."""
    return torch.cat([matrix, torch.zeros(SKETCH_ROWS - len(matrix), matrix.shape[1])]).double()


def choose(strategy, rank, **statistics):
    return select_columns(strategy, META, rank, seed=0, statistics=statistics).tolist()


def test_gradient_activation_is_the_product_of_norms():
    statistics = {
        "gradient": torch.tensor([4.0, 1, 9, 0, 1, 1]),
        "activation": torch.tensor([1.0, 9, 0, 99, 4, 1]),
    }
    # Norms 2 1, 1 3, 3 0, 0 10, 1 2, 1 1; the first of equal ones.
    assert choose("gradient_activation", 2, **statistics) == [0, 1]
    assert choose("gradient_activation", 4, **statistics) == [0, 1, 4, 5]


def test_pivoted_qr_passes_over_copies():
    """Columns 0 and 1 are the largest and the same; 2 is smaller and new."""
    columns = torch.tensor([[3.0, 3.0, 0.0, 0.1], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.1]])
    meta = torch.empty(1, 4, device="meta")
    chosen = select_columns(
        "activation_qr", meta, 2, seed=0, statistics={"activation_sketch": sketch_of(columns)}
    )
    assert chosen.tolist() == [0, 2]
    by_norm = select_columns(
        "activation", meta, 2, seed=0, statistics={"activation": columns.square().sum(0)}
    )
    assert by_norm.tolist() == [0, 1]


def test_pivoted_qr_is_that_of_scipy():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    pivots = scipy_linalg.qr(matrix.numpy(), mode="r", pivoting=True)[1]
    chosen = select_columns(
        "activation_qr",
        torch.empty(1, 12, device="meta"),
        5,
        seed=0,
        statistics={"activation_sketch": sketch_of(matrix)},
    )
    assert chosen.tolist() == sorted(pivots[:5].tolist())


def test_leverage_is_that_of_the_eigenvectors():
    matrix = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).double()
    vectors = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -2:]
    expected = vectors.square().sum(1).topk(2).indices.sort().values
    assert choose("activation_leverage", 2, activation_sketch=sketch_of(matrix)) == (
        expected.tolist()
    )


@pytest.mark.parametrize("strategy", ["activation_qr", "activation_leverage"])
def test_more_columns_than_the_sketch_tells_apart(strategy):
    wide = torch.empty(1, 300, device="meta")
    statistics = {"activation_sketch": torch.ones(SKETCH_ROWS, 300)}
    with pytest.raises(ValueError, match=r"at most 256 columns apart .* and the rank is 257"):
        select_columns(strategy, wide, 257, seed=0, statistics=statistics)


def collect(model, kinds, targets=("up", "down"), batches=None, **options):
    config = PacaConfig(r=2, target_modules=list(targets), **options)
    batches = make_batches() if batches is None else batches
    return collect_statistics(model, batches, config, kinds=kinds, loss_fn=loss_of)


def inputs_of(model, name, batches):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for ids, _ in batches:
            model(ids)
    handle.remove()
    return torch.cat(found)


def test_sketch_keeps_the_products_of_columns():
    """With fewer tokens than rows few collide, so errors are small; the diagonal is close."""
    model, batches = build(), make_batches(2)
    sketch = collect(model, ["activation_sketch"], batches=batches).of("down")["activation_sketch"]
    x = inputs_of(model, "down", batches)
    assert sketch.shape == (SKETCH_ROWS, 16)
    exact, found = x.t() @ x, sketch.t() @ sketch
    assert (found - exact).norm() < 0.5 * exact.norm()
    # Signed sums of the tokens: whatever the rows, all is there.
    assert torch.linalg.matrix_rank(sketch, rtol=1e-6) == torch.linalg.matrix_rank(x, rtol=1e-6)


def test_sketch_errors_average_out():
    """Over many draws the mean of S^T S is X^T X, though each row mixes several tokens."""
    from pacatune.selection.collect import _Sketch

    x = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    sketch = _Sketch(0)
    total = torch.zeros(5, 5)
    for _ in range(200):
        s = sketch(x)
        total += s.t() @ s / 200
    exact = x.t() @ x
    assert (total - exact).norm() < 0.02 * exact.norm()
    single = sketch(x)
    assert (single.t() @ single - exact).norm() > 0.02 * exact.norm()


def test_sketch_is_reproducible_and_saved(tmp_path):
    first, second = (collect(build(), ["activation_sketch"]) for _ in range(2))
    first.save(tmp_path / "s.safetensors")
    loaded = ColumnStatistics.load(tmp_path / "s.safetensors")
    for name in first.values:
        sketch = first.of(name)["activation_sketch"]
        assert torch.equal(sketch, second.of(name)["activation_sketch"])
        assert torch.equal(sketch, loaded.of(name)["activation_sketch"])
    assert not torch.equal(*(s.of("up")["activation_sketch"][:, :2] for s in (first, _shifted())))


def _shifted():
    return collect(build(), ["activation_sketch"], batches=make_batches(3))


@pytest.mark.parametrize("shape", [(6,), (SKETCH_ROWS - 1, 6), (2, SKETCH_ROWS, 6)])
def test_sketch_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"it must be 256 floating-point numbers for each column"):
        ColumnStatistics(values={"a": {"activation_sketch": torch.ones(shape)}}, num_batches=1)


@pytest.mark.parametrize("strategy", ["gradient_activation", "activation_qr"])
def test_strategies_choose_for_a_model(strategy):
    model = build()
    config = PacaConfig(r=2, target_modules=["up", "down"], selection=strategy)
    statistics = collect_statistics(model, make_batches(), config, loss_fn=loss_of)
    chosen = choose_columns(model, config, statistics).columns
    assert {name: len(columns) for name, columns in chosen.items()} == {"up": 2, "down": 2}


LAYERS = {"q": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def llama_statistics(model, **values):
    modules = {
        name: module
        for name, module in model.named_modules()
        if name.endswith("_proj") and hasattr(module, "weight")
    }
    found = {
        name: {kind: make(name, module.in_features) for kind, make in values.items()}
        for name, module in modules.items()
    }
    return ColumnStatistics(values=found, num_batches=1)


def test_budget_follows_gradients_within_the_parameters():
    model = build_model(40)
    config = PacaConfig(r=4, paca_alpha=8, task_type="CAUSAL_LM")
    statistics = llama_statistics(
        model, gradient=lambda name, n: torch.full((n,), 16.0 if "layers.1" in name else 1.0)
    )
    budgeted = allocate_ranks(model, config, statistics)
    ranks = budgeted.rank_pattern
    for name in ranks:
        if "layers.0" in name:  # a quarter of the gradient's norm
            other = ranks[name.replace("layers.0", "layers.1")]
            assert abs(ranks[name] - other / 4) <= 1
            assert ranks[name] < other
    assert all(budgeted.alpha_pattern[name] == 2 * rank for name, rank in ranks.items())

    def num_trained(config):
        adapted = get_peft_model(build_model(40), config)
        return sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    equal, found = num_trained(config), num_trained(budgeted)
    assert 0.9 * equal < found <= equal
    assert config.rank_pattern == {}


def test_budget_gives_no_more_columns_than_there_are():
    model = build_model(40)
    config = PacaConfig(r=30, target_modules=["k_proj", "down_proj"])
    statistics = llama_statistics(
        model, gradient=lambda name, n: torch.full((n,), 1e6 if "k_proj" in name else 1e-6)
    )
    ranks = allocate_ranks(model, config, statistics).rank_pattern
    assert {rank for name, rank in ranks.items() if "k_proj" in name} == {32}
    assert min(ranks.values()) >= 1


def test_budget_refuses():
    model = build_model(40)
    statistics = llama_statistics(model, activation=lambda name, n: torch.ones(n))
    with pytest.raises(ValueError, match=r"no gradient of .* by which ranks are allotted"):
        allocate_ranks(model, PacaConfig(r=2), statistics)
    with pytest.raises(ValueError, match=r"`rank_pattern` .* are what gradients are to decide"):
        allocate_ranks(model, PacaConfig(r=2, rank_pattern={"q_proj": 3}), statistics)


@pytest.mark.parametrize("selection", ["random", "weight_norm", "gradient", "activation"])
def test_shared_columns(selection):
    model = build_model(40)
    draw = torch.Generator().manual_seed(0)
    inputs = {}

    def activation(name, n):
        """The same for layers with the same input."""
        key = name.rpartition(".")[0], n
        return inputs.setdefault(key, torch.rand(n, generator=draw))

    statistics = llama_statistics(
        model, gradient=lambda name, n: torch.rand(n, generator=draw), activation=activation
    )
    config = PacaConfig(r=4, selection=selection)
    columns = choose_columns(model, share_columns(model, config, statistics), statistics).columns
    assert len(columns) == 14
    for parent in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        q, k, v = (columns[f"{parent}.{name}_proj"] for name in "qkv")
        assert q == k == v
    mlp = "model.layers.1.mlp"
    assert columns[f"{mlp}.gate_proj"] == columns[f"{mlp}.up_proj"]
    qkv = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    found = columns[qkv[0]]
    if selection == "random":
        seed = seed_for(config.random_seed, qkv[0])
        assert found == select_columns("random", torch.empty(1, 32), 4, seed=seed).tolist()
    elif selection == "gradient":
        total = sum(statistics.of(name)["gradient"] for name in qkv)
        assert found == total.topk(4).indices.sort().values.tolist()
    elif selection == "weight_norm":
        rows = torch.cat([model.get_submodule(name).weight for name in qkv])
        assert found == rows.norm(dim=0).topk(4).indices.sort().values.tolist()


def test_sharing_refuses():
    model = build_model(40)
    with pytest.raises(ValueError, match=r"of the 4 targets none have the same input"):
        share_columns(model, PacaConfig(r=2, target_modules=["o_proj", "down_proj"]))
    with pytest.raises(ValueError, match="`columns` are given, so none can be shared"):
        share_columns(model, PacaConfig(r=2, selection={"q_proj": [0, 1]}))
    with pytest.raises(ValueError, match="needs statistics of the kind gradient"):
        share_columns(model, PacaConfig(r=2, selection="gradient"))
