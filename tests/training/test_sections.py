import pytest

from pacatune.training import PacaSection
from pacatune.training.config_file import to_values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "(q"}, r"section `paca`: .*_modules` \('\(q'\) is no regular exp"),
        ({"selection_batches": 0}, r"`paca.selection_batches` \(0\) must be at least 1"),
        ({"paca_alpha": 0}, r"`paca.paca_alpha` \(0\) .* must not be 0: nothing would"),
        ({"alpha_pattern": {"up": 0}}, r"\(\{'up': 0\}\) must not be 0"),
    ],
)
def test_options_of_columns_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PacaSection(**options)


def test_a_folder_is_known_by_its_name(make_config, tmp_path, monkeypatch):
    """As a path, or where no strategy is called like it; it is saved with its whole path."""
    monkeypatch.chdir(tmp_path)
    for name in ("some-run", "gradient"):
        (tmp_path / name).mkdir()
    for given, saved in (
        ("some-run", str(tmp_path / "some-run")),
        ("gradient", "gradient"),
        ("./gradient", str(tmp_path / "gradient")),
    ):
        config = make_config(paca=PacaSection(selection=given))
        assert to_values(config)["paca"]["selection"] == saved
