import pytest

from pacatune.files.json_file import MAX_JSON_BYTES, parse_json_object, read_json_object


def parse(text):
    return parse_json_object(text.encode(), source="it")


def test_an_object_is_read_with_its_values():
    text = '{"a": [1, 2.5, null, true], "b\\"[": {"c": "]]]]"}}'
    assert parse(text) == {"a": [1, 2.5, None, True], 'b"[': {"c": "]]]]"}}


def test_brackets_inside_strings_are_not_depth():
    assert parse('{"a": "' + "[" * 1000 + '"}') == {"a": "[" * 1000}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000_000, "it is not valid JSON: maximum recursion"),
        ('{"a":' * 500_000, "it is not valid JSON: maximum recursion"),
        ("[1]", "it holds a JSON list; it must be an object"),
        ('"text"', "it holds a JSON str; it must be an object"),
        ('{"a": 1', "it is not valid JSON"),
        ("", "it is not valid JSON"),
        ('{"a": "', "it is not valid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": -Infinity}', "-Infinity is no finite number"),
        ('{"a": -1e999}', "-1e999 is no finite number"),
        ('{"a": 1' + "0" * 10_000 + "}", "1000.* is no finite number"),
        ('{"a": 1' + "0" * 40 + "}", "a number has 41 digits; at most 40 are read"),
    ],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_bytes_that_are_no_utf8_are_refused():
    with pytest.raises(ValueError, match="it is not valid JSON"):
        parse_json_object(b'{"a": "\xff"}', source="it")


def test_quotes_and_backslashes_take_linear_time():
    with pytest.raises(ValueError, match="it is not valid JSON"):
        parse('"' + '\\"' * 1_000_000)


def test_a_large_file_is_refused(tmp_path):
    path = tmp_path / "large.json"
    path.write_text('{"a": "' + "x" * MAX_JSON_BYTES + '"}')
    with pytest.raises(ValueError, match=r"large.json is 41943\d+ bytes; at most 4194304 are read"):
        read_json_object(path)


def test_a_deep_file_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"a": ' + "[" * 17 + "]" * 17 + "}")
    with pytest.raises(ValueError, match=r"deep.json is nested deeper than 16 levels"):
        read_json_object(path)


@pytest.mark.parametrize("text", ['{"a": "\\u001b[2J"}', '{"a": ["\\ud800"]}', '{"a\\n": 1}'])
def test_control_characters_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="control characters are not allowed"):
        read_json_object(path)
