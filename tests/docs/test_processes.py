"""Pages about several processes: their blocks run."""

import pytest

from tests.docs.blocks import documents_of


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_of("processes"))
def test_blocks_run(document, run_blocks):
    run_blocks(document)
