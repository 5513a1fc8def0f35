"""Registration with PEFT."""

import pickle

import pytest
from peft.utils import PeftType

from pacatune.tuner.registration import ensure_peft_type


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
