"""Registration with PEFT, each case in a process of its own: the registry is global."""

import pickle
import textwrap

import pytest
from peft.utils import PeftType

from pacatune import PacaConfig
from pacatune.tuner.registration import ensure_peft_type
from tests.forks import run_python


def run(code: str) -> str:
    result = run_python(textwrap.dedent(code))
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
