"""Random walks over one layer of every kind (walk.py); `make soak` takes half an hour of them."""

from hypothesis import HealthCheck, settings

from pacatune.tuner.layout import _KINDS
from tests.residency.twin import KINDS
from tests.residency.walk import Walk


class TestWalk(Walk.TestCase):
    """A few seconds."""

    settings = settings(
        max_examples=80,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_every_kind_of_layer_has_its_line() -> None:
    layers = [kind.build() for kind in KINDS.values()]
    for kinds, layout in _KINDS:
        assert any(isinstance(layer, kinds) for layer in layers), layout.title
