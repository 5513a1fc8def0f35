"""What the tests of both demos share: a module has the `words` of its command."""

import pytest

from pacatune.cli import main


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """Output folder of a demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo outputs") / "a demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        lines = []
        patch.setattr("rich.console.Console.print", _recording(lines))
        assert main([*words, "--output", str(folder)]) == 0
    return folder, lines


def _recording(lines):
    from rich.console import Console

    real = Console.print

    def record(self, *objects, **options):
        with self.capture() as capture:
            real(self, *objects, **options)
        lines.extend(capture.get().splitlines())

    return record
