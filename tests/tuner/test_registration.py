"""Registration with PEFT, each case in a process of its own: the registry is global."""

import pickle
import subprocess
import sys
import textwrap

import pytest
from peft.utils import PeftType

from pacatune import PacaConfig
from pacatune.tuner.registration import ensure_peft_type

FOREIGN = """
    # What PEFT 0.22 does: the member, and a PaCA of its own for plain Linear layers.
    from dataclasses import dataclass
    import peft
    from peft import PeftConfig, mapping
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType, register_peft_method
    from pacatune.tuner.registration import ensure_peft_type
    ensure_peft_type()

    @dataclass
    class ForeignConfig(PeftConfig):
        r: int = 8
        paca_alpha: int = 8
        target_modules: object = None
        random_seed: int = 42
        init_weights: bool = True
        modules_to_save: object = None
        only_theirs: int = 1
        def __post_init__(self):
            super().__post_init__()
            self.peft_type = PeftType.PACA

    class ForeignModel(BaseTuner):
        prefix = "paca_"
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_member_is_a_real_one() -> None:
    member = PeftType.PACA
    assert ensure_peft_type() is member
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str.__str__(member)) == ("PACA",) * 3
    assert PeftType("PACA") is member
    assert PeftType["PACA"] is member
    assert member in list(PeftType)
    assert hash(member) == hash("PACA")
    assert pickle.loads(pickle.dumps(member)) is member
    with pytest.raises(AttributeError):
        PeftType.PACA = "other"


def test_config_survives_pickle_in_a_fresh_process(tmp_path) -> None:
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(PacaConfig(r=3)))
    code = f"""
        import pickle
        config = pickle.loads(open({str(path)!r}, "rb").read())
        print(config.r, config.peft_type.value)
    """
    assert run(code) == "3 PACA"


def test_takes_the_place_of_peft_0_22s_own() -> None:
    code = f"""
        import sys
        {textwrap.indent(textwrap.dedent(FOREIGN), " " * 8).strip()}
        for table in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING,
                      mapping.PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop("PACA", None)
        register_peft_method(name="paca", config_cls=ForeignConfig, model_cls=ForeignModel)
        peft.PacaConfig, peft.PacaModel = ForeignConfig, ForeignModel

        from pacatune import PacaConfig, PacaModel
        from pacatune.tuner.registration import register
        register(PacaConfig, PacaModel)
        register(PacaConfig, PacaModel)
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["PACA"] is PacaModel
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PACA"] is PacaConfig
        assert peft.PacaConfig is PacaConfig and peft.PacaModel is PacaModel
        from torch import nn
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(10, 10)), ForeignConfig(r=2, target_modules=["0"])
        )
        print(type(model.base_model).__module__, type(model.peft_config["default"]).__module__)
    """
    assert run(code) == "pacatune.tuner.model pacatune.tuner.config"
