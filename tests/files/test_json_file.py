import pytest

from pacatune.files.json_file import MAX_JSON_BYTES, parse_json_object, read_json_object


def parse(text):
    data = text if isinstance(text, bytes) else text.encode()
    return parse_json_object(data, source="it")


def test_an_object_is_read_with_its_values():
    text = '{"a": [1, 2.5, null, true], "b\\"[": {"c": "]]]]"}}'
    assert parse(text) == {"a": [1, 2.5, None, True], 'b"[': {"c": "]]]]"}}
    # Brackets inside strings are not depth.
    assert parse('{"a": "' + "[" * 1000 + '"}') == {"a": "[" * 1000}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000_000, "it is not valid JSON: maximum recursion"),
        ("[1]", "it holds a JSON list; it must be an object"),
        ('{"a": 1', "it is not valid JSON"),
        ("", "it is not valid JSON"),
        (b'{"a": "\xff"}', "it is not valid JSON"),
        ('"' + '\\"' * 1_000_000, "it is not valid JSON"),  # takes linear time
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": -1e999}', "-1e999 is no finite number"),
        ('{"a": 1' + "0" * 10_000 + "}", "1000.* is no finite number"),
        ('{"a": 1' + "0" * 40 + "}", "a number has 41 digits; at most 40 are read"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "' + "x" * MAX_JSON_BYTES + '"}', r"is 16777\d+ bytes; at most 16777216 are read"),
        ('{"a": ' + "[" * 17 + "]" * 17 + "}", "is nested deeper than 16 levels"),
        ('{"a": "\\u001b[2J"}', "control characters are not allowed"),
        ('{"a": ["\\ud800"]}', "control characters are not allowed"),
        ('{"a\\n": 1}', "control characters are not allowed"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=f"file.json.* {message}"):
        read_json_object(tmp_path / "file.json")
