"""Blocks of README and docs run; all but the first pages' in `make test-docs`."""

import pytest

from tests.docs.blocks import DOCUMENTS, FIRST, OF_PROCESSES, read_blocks

REST = [
    document
    for document in DOCUMENTS
    if document not in (*FIRST, *OF_PROCESSES) and read_blocks(document)
]


@pytest.mark.slow
@pytest.mark.parametrize("document", FIRST)
def test_first_blocks_run(document, run_blocks):
    run_blocks(document)


@pytest.mark.docs
@pytest.mark.parametrize("document", REST)
def test_blocks_run(document, run_blocks):
    run_blocks(document)


@pytest.mark.docs
@pytest.mark.parametrize("document", OF_PROCESSES)
def test_blocks_of_several_processes_run(document, run_blocks):
    run_blocks(document)
