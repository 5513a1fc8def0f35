"""Pages about several processes: their blocks run."""

import multiprocessing

import pytest

from tests.docs.blocks import documents_of


def test_no_processes_of_another_folder_are_left():
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_of("processes"))
def test_blocks_run(document, run_blocks):
    run_blocks(document)
