"""Storages are counted from their allocation to their end, once, by what they are for."""

import pytest
import torch
from torch import nn

from pacatune.measure.tracker import StorageTracker


def test_each_storage_counts_once_while_it_lives_by_its_share():
    with StorageTracker({"weights": 0.25}) as tracker:
        x = torch.empty(100)
        view = x.view(10, 10)[2:]
        assert tracker.num_bytes == 400
        del x
        assert tracker.num_bytes == 400
        del view
        assert tracker.num_bytes == 0
        weight = torch.empty(100)
        tracker.hold([weight], "weights")
        assert tracker.num_bytes == 100
        del weight
        assert tracker.num_bytes == 0
    assert tracker.peak_bytes == 400


def test_peak_has_its_parts_and_its_moment():
    with StorageTracker() as tracker:
        weight = torch.empty(50)
        tracker.hold([weight], "weights")
        tracker.phase = "backward"
        x = torch.empty(100)
        tracker.phase = "optimizer"
        del x
    assert tracker.by_category == {"weights": 200, "temporaries": 400}
    assert (tracker.peak_bytes, tracker.peak_phase) == (600, "backward")


def test_saved_tensors_are_activations_of_their_module_until_backward_makes_gradients():
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    num_weights = 8 * 16 + 16 + 16 * 4 + 4
    with StorageTracker() as tracker:
        tracker.hold(model.parameters(), "weights")
        tracker.watch_gradients(model.parameters())
        x = torch.empty(2, 8)
        y = model(x).sum()
        tracker.settle_activations(y)
        # Its input; what goes into SiLU; what comes out of it, kept by the last layer.
        inputs = {"linear layers": 2 * 8 * 4 + 2 * 16 * 4, "SiLU": 2 * 16 * 4}
        assert tracker.owned_by_module("activations") == inputs
        y.backward()
        del x, y
        assert tracker.owned_by_module("activations") == {}
        assert sum(tracker.owned_by_module("gradients").values()) == num_weights * 4
        assert tracker.num_bytes == 2 * num_weights * 4


def test_hooks_end_with_the_context():
    layer = nn.Linear(8, 4)
    with StorageTracker() as tracker:
        tracker.watch_gradients(layer.parameters())
        with pytest.raises(RuntimeError):
            layer(torch.empty(2, 7))
    before = tracker.num_bytes
    layer(torch.empty(2, 8)).sum().backward()
    assert tracker.num_bytes == before
    assert not layer.weight._post_accumulate_grad_hooks
