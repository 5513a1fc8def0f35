import pytest
import torch

from pacatune.format.tensors import check_tensors, group_tensors, split_tensor_name

PREFIX = "base_model.model.layers.0.q_proj"


def tensors(delta=None, indices=None):
    """One module's valid tensors, with either replaced."""
    return {
        f"{PREFIX}.paca_delta": torch.ones(4, 3) if delta is None else delta,
        f"{PREFIX}.paca_indices": torch.tensor([0, 2, 5]) if indices is None else indices,
    }


def test_valid_tensors_pass_and_are_grouped_by_module():
    extra = {"base_model.model.lm_head.weight": torch.full((2, 2), torch.nan)}
    check_tensors(tensors() | extra, source="here")
    (module, update), *rest = group_tensors(tensors() | extra, source="here").items()
    assert module == "layers.0.q_proj"
    assert not rest
    assert update.delta.shape == (4, 3)
    assert update.indices.tolist() == [0, 2, 5]
    # Values on the meta device are not looked at.
    check_tensors({name: tensor.to("meta") for name, tensor in tensors().items()}, source="here")


def test_the_prefix_of_peft_is_optional():
    assert split_tensor_name("layers.0.q_proj.paca_delta") == ("layers.0.q_proj", "paca_delta")
    assert split_tensor_name("base_model.model.q.paca_indices") == ("q", "paca_indices")
    assert split_tensor_name("base_model.model.q.bias") is None


def test_half_a_module_is_refused():
    for missing, other in (("paca_indices", "paca_delta"), ("paca_delta", "paca_indices")):
        half = {name: one for name, one in tensors().items() if not name.endswith(missing)}
        message = f"here: module 'layers.0.q_proj' has `{other}` but no `{missing}`"
        with pytest.raises(ValueError, match=message):
            check_tensors(half, source="here")


NOT_FINITE = r"here: tensor 'layers.0.q_proj.paca_delta' holds values that are not finite"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(value):
    delta = torch.ones(4, 3).index_fill(1, torch.tensor(0), value)
    with pytest.raises(ValueError, match=NOT_FINITE):
        check_tensors(tensors(delta=delta), source="here")


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int32), r"dtype torch.int32; it must be one of float64"),
        (torch.ones(3), r"shape \(3,\); it must be \(out_features, rank\)"),
        (torch.ones(4, 0), r"shape \(4, 0\); it must be \(out_features, rank\)"),
        (torch.ones(4, 2), r"shape \(3,\); it must be \(2,\), one entry for each column"),
        (torch.ones(3, 2, 1, 3), r"shape \(3,\); it must be \(2,\), .* shape \(3, 2, 1, 3\)"),
        (torch.ones(4, 2, 5), r"shape \(3,\); it must be \(2,\) or \(5,\), one entry"),
    ],
)
def test_a_delta_of_another_dtype_or_shape_is_refused(delta, message):
    with pytest.raises(ValueError, match=rf"here: module 'layers.0.q_proj': .*{message}"):
        check_tensors(tensors(delta=delta), source="here")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 2, 5], dtype=torch.int32), "dtype torch.int32; it must be torch.int64"),
        (torch.tensor([[0, 2, 5]]), r"shape \(1, 3\); it must be \(3,\)"),
        (torch.tensor(3), r"shape \(\); it must be \(3,\)"),
        (torch.tensor([-1, 2, 5]), "holds -1 at position 0; column numbers must be sorted"),
        (torch.tensor([0, 5, 2]), "holds 2 at position 2; .* sorted"),
        (torch.tensor([0, 2, 2]), "holds 2 at position 2; .* unique"),
    ],
)
def test_indices_must_be_int64_sorted_and_unique(indices, message):
    with pytest.raises(ValueError, match=rf"here: module 'layers.0.q_proj': .*{message}"):
        check_tensors(tensors(indices=indices), source="here")


def test_row_groups_are_refused():
    given = tensors() | {f"{PREFIX}.paca_places": torch.tensor([[0, 1, 2], [1, 2, 3]])}
    with pytest.raises(ValueError, match=r"here: .*paca_places' is of .* row groups.* commit d5e"):
        check_tensors(given, source="here")
