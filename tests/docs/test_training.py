"""Pages about training and its results, and all of no other part: their blocks run."""

import pytest

from tests.docs.blocks import documents_of


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_of("training"))
def test_blocks_run(document, run_blocks):
    run_blocks(document)
