"""One request and its misfortunes, against a real server on this machine."""

import datetime
import socket
import traceback
from email.utils import format_datetime

import pytest

from pacatune.evaluation.mt_bench.client import (
    JudgeClient,
    JudgeStopped,
    JudgeUnavailable,
    RequestRefused,
)
from pacatune.evaluation.mt_bench.questions import Prompt
from tests.evaluation.mt_bench.judge_server import rating_of

PROMPT = Prompt(
    name="single-v1",
    system="Be kind.",
    user="[[rating]] [Question] [The Start of Assistant's Answer] [The End of Assistant's Answer]",
)
KEY = "sk-secret-0123456789"


@pytest.fixture
def client(judge):
    """Asks the judge; `client.waits` holds what it would have waited."""
    client = JudgeClient(url=judge.url, model="judge")
    client.waits = []
    client.stop.wait = client.waits.append
    return client


def unused_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_reply(client, judge):
    reply = client.ask(PROMPT)
    assert f"[[{rating_of(PROMPT.user)}]]" in reply.text
    assert (reply.model, reply.finish_reason) == ("judge-2026-01-01", "stop")
    assert reply.usage == {"prompt_tokens": 100, "completion_tokens": 10}
    ((headers, body),) = judge.requests
    assert [message["content"] for message in body["messages"]] == [PROMPT.system, PROMPT.user]
    assert "Authorization" not in headers
    assert judge.complaints == client.waits == []


def test_a_reasoning_judge_is_asked_in_its_words(client, judge):
    judge.reasons = True
    first, second = client.ask(PROMPT), client.ask(PROMPT)
    assert judge.complaints == client.waits == []
    assert len(judge.requests) == 4  # two refusals, and what they taught is remembered
    assert first.text == second.text
    assert first.temperature is second.temperature is None


def test_other_judges_are_asked_for_their_temperature(client):
    assert client.ask(PROMPT).temperature == 0


def test_a_refusal_that_teaches_nothing_is_one(client, judge):
    # What vLLM says of prompts that are too long.
    text = "'max_tokens' or 'max_completion_tokens' is too large: 2048"
    judge.misdeeds.append((400, {}, {"message": text}))
    with pytest.raises(RequestRefused, match="too large"):
        client.ask(PROMPT)
    assert client.ask(PROMPT).temperature == 0
    assert judge.complaints == []


def test_the_whole_address_is_taken_too(judge):
    for url in (judge.url + "/", judge.url + "/chat/completions"):
        assert JudgeClient(url=url, model="judge").ask(PROMPT).text
    assert judge.complaints == []


@pytest.mark.parametrize("misdeed", [(429, {}, {}), (500, {}, "x"), (503, {}, {}), "html", "cut"])
def test_what_may_pass_is_tried_again(client, judge, misdeed):
    judge.misdeeds.extend([misdeed] * 3)
    assert client.ask(PROMPT).text
    assert len(judge.requests) == 4
    for attempt, wait in enumerate(client.waits):
        assert 2**attempt / 2 <= wait <= 2**attempt


def test_waits_grow_to_a_minute_and_then_it_gives_up(client, judge):
    judge.misdeeds.extend([(500, {}, {"message": "out of order"})] * 20)
    client.max_retries = 9
    with pytest.raises(JudgeUnavailable, match=r"gives no answer \(10 tries\): 500: out of order"):
        client.ask(PROMPT)
    assert len(judge.requests) == 10
    assert len(client.waits) == 9
    assert 30 <= max(client.waits) <= 60


def test_retry_after_is_honoured(client, judge):
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    texts = ("7", format_datetime(date, usegmt=True), "soon")
    judge.misdeeds.extend((429, {"Retry-After": text}, {}) for text in texts)
    assert client.ask(PROMPT).text
    seconds, until, unknown = client.waits
    assert 7 <= seconds <= 7.5
    assert 97 <= until <= 101
    assert 2 <= unknown <= 4


@pytest.mark.parametrize(
    ("misdeed", "message"),
    [
        (
            (429, {"Retry-After": "3600"}, {"message": "slow down"}),
            r"slow down \(come back in 3600 s",
        ),
        ((429, {}, {"message": "pay", "code": "insufficient_quota"}), "pay insufficient_quota"),
    ],
)
def test_waiting_that_does_not_help_is_not_done(client, judge, misdeed, message):
    judge.misdeeds.append(misdeed)
    with pytest.raises(JudgeUnavailable, match=message):
        client.ask(PROMPT)
    assert client.waits == []


@pytest.mark.parametrize("misdeed", ["hang", "trickle"])
def test_a_judge_that_does_not_finish_is_given_up(client, judge, misdeed):
    client.timeout_s, client.max_retries = 0.3, 1
    judge.misdeeds.extend([misdeed, misdeed])
    message = r"gives no answer \(2 tries\): no reply within 0.3 s"
    with pytest.raises(JudgeUnavailable, match=message):
        client.ask(PROMPT)


def test_a_judge_that_is_down():
    client = JudgeClient(url=f"http://127.0.0.1:{unused_port()}/v1", model="judge", max_retries=0)
    with pytest.raises(JudgeUnavailable, match=r"gives no answer: .*refused"):
        client.ask(PROMPT)
    with pytest.raises(JudgeUnavailable, match=r"nothing answers at --judge-url .*--no-judge only"):
        client.check_reachable()


def test_a_judge_that_is_up_is_reachable(client, judge):
    client.check_reachable()
    assert judge.requests == []


def test_a_proxy_is_not_asked_whether_it_reaches_the_judge(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    JudgeClient(url="https://judge.invalid/v1", model="judge").check_reachable()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated(client, judge, status):
    judge.misdeeds.append((status, {}, {"message": "too\nlong\x1b[2J", "code": "length"}))
    with pytest.raises(RequestRefused, match=rf"{status}: too long \[2J length"):
        client.ask(PROMPT)
    assert len(judge.requests) == 1


@pytest.mark.parametrize("status", [302, 307, 404])
def test_a_wrong_address_is_said_at_once_and_no_redirect_followed(client, judge, status):
    judge.misdeeds.append((status, {"Location": judge.url}, {"message": "not here"}))
    with pytest.raises(JudgeUnavailable, match=rf"answers {status}: not here; check --judge-url"):
        client.ask(PROMPT)
    assert len(judge.requests) == 1


@pytest.mark.parametrize("key", [KEY, 'sk-secret"0123\\456'])  # which JSON escapes
def test_the_key_is_sent_and_shown_nowhere(judge, key):
    judge.key = key
    judge.model = f"judge of {key}"
    client = JudgeClient(url=judge.url, model=judge.model, key=key, max_retries=0)
    judge.misdeeds.extend(["leak", (500, {}, {"message": f"{key} is out of order"})])
    reply = client.ask(PROMPT)
    assert reply.text == "I was given Bearer ***. [[7]]"
    assert reply.model == "judge of ***-2026-01-01"
    assert judge.requests[0][0]["Authorization"] == f"Bearer {key}"
    with pytest.raises(JudgeUnavailable, match=r"500: \*\*\* is out of order") as caught:
        client.ask(PROMPT)
    assert key not in "".join(traceback.format_exception(caught.value))
    client.model = "judge"
    assert key not in repr(client)


def test_a_refused_key_is_not_repeated_even_in_part(judge):
    judge.key = "another"
    client = JudgeClient(url=judge.url, model="judge", key=KEY)
    with pytest.raises(JudgeUnavailable, match=r"refuses the key \(401\); name the va") as caught:
        client.ask(PROMPT)
    assert "sk-" not in "".join(traceback.format_exception(caught.value))
    assert len(judge.requests) == 1


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ä", "sk-\x00"])
def test_a_key_that_no_header_can_have(key):
    with pytest.raises(ValueError, match="the judge's key has characters") as caught:
        JudgeClient(url="http://localhost/v1", model="judge", key=key)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "https://",
        "https://me:sk-secret@host/v1",
        "https://host/v1?key=sk-secret",
        "https://host/v1#sk-secret",
        "https://host /v1",
        "https://host/v1\n",
        "https://host:0/v1",
    ],
)
def test_addresses_that_are_none_or_hold_secrets(url):
    with pytest.raises(ValueError, match=r"--judge-url \('.*'\) must be like https") as caught:
        JudgeClient(url=url, model="judge")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host:port/v1", "https://host:99999", "http://[::1/v1"])
def test_addresses_that_cannot_be_read(url):
    with pytest.raises(ValueError, match="the host or the port of the one given cannot be read"):
        JudgeClient(url=url, model="judge")


def test_a_stopped_client_asks_nothing_and_waits_no_more(judge):
    client = JudgeClient(url=judge.url, model="judge")
    judge.misdeeds.append((500, {}, {}))
    client.stop.wait = lambda seconds: client.stop.set()
    with pytest.raises(JudgeStopped):
        client.ask(PROMPT)
    assert len(judge.requests) == 1


def test_a_reply_without_text_is_empty(client, judge):
    judge.misdeeds.append("silent")
    assert client.ask(PROMPT).text == ""


def test_an_endless_reply_is_refused(client, judge, monkeypatch):
    monkeypatch.setattr("pacatune.evaluation.mt_bench.client._MAX_REPLY_BYTES", 20)
    client.max_retries = 0
    with pytest.raises(JudgeUnavailable, match="a reply of more than 20 bytes"):
        client.ask(PROMPT)
