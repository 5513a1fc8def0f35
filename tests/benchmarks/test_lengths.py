"""The longest sequences: the simulations take half an hour; their names are those committed."""

from types import SimpleNamespace

from benchmarks import check, lengths, tables
from benchmarks.results import read


def test_every_row_is_in_the_committed_result(monkeypatch):
    estimate = SimpleNamespace(saved_bytes=2048)
    monkeypatch.setattr(lengths, "find_max", lambda setting, what, memory: (1024, estimate))
    found = lengths.found()
    committed = read("lengths").rows
    assert [check._key(row) for row in found] == [check._key(row) for row in committed]
    assert {row.value for row in found} == {1024, 2}
    assert "simulated" in tables.block("lengths")
