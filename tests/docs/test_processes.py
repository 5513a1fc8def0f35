"""Blocks of pages about several processes run, in `make test-docs`."""

import pytest

from tests.docs.blocks import OF_PROCESSES


@pytest.mark.docs
@pytest.mark.parametrize("document", OF_PROCESSES)
def test_blocks_run(document, run_blocks):
    run_blocks(document)
