"""Pages about measurements and evaluations: their blocks run."""

import pytest

from tests.docs.blocks import documents_of


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_of("measuring"))
def test_blocks_run(document, run_blocks):
    run_blocks(document)
