"""vLLM's own loader takes a sync as patches; nothing of ours is called in its worker."""

from functools import partial

import pytest

from pacatune.sync import ColumnSource, element_patches
from tests.sync.conftest import nudge
from tests.vllm.conftest import (
    adapted,
    save_small_model,
    served_digests,
    start,
    stop,
    trained_digests,
)


@pytest.fixture(scope="module")
def folder(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_small_model(model_path, folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions go to the worker
        engine = start(folder)
        yield engine
        stop(engine)


@pytest.fixture
def load(llm):
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    def load_columns(columns):
        patches = [CheckpointWeightPatch(**patch._asdict()) for patch in element_patches(columns)]
        # A function that pickle knows, since the worker is another process.
        return llm.apply_model(partial(load_checkpoint_weight_patches, patches=patches))

    return load_columns


def test_its_loader_serves_the_bits_of_a_merge(llm, load, folder):
    base, model = served_digests(llm), adapted(folder, init_weights=False)
    source = ColumnSource(model)
    for number in range(3):
        columns = source.columns()
        assert (columns.last is not None) == (number > 0)
        load(columns)
        assert served_digests(llm) == trained_digests(model)
        assert served_digests(llm) != base
        nudge(model, number)
    assert load(source.columns())
    load(source.base_columns())
    assert served_digests(llm) == base
