"""Checks of JSON at reading: an error names the file and the place in it."""

import pytest

from textenv.checks.json_files import parse_json, read_json

SHAPE = {"format": int, "files": {str: {"size": int}}, "rows": [{"at": int, str: (float, None)}], "any": object}
RIGHT = {"format": 1, "files": {"a": {"size": 2, "more": []}}, "rows": [{"at": 1, "x": 0.5, "y": None}], "any": None}


def test_json_of_the_expected_shape_is_returned(tmp_path):
    (tmp_path / "a.json").write_text(str(RIGHT).replace("'", '"').replace("None", "null"))
    assert read_json(tmp_path / "a.json", SHAPE) == RIGHT
    assert parse_json("[1, 2.5]", [float], "here") == [1, 2.5] and parse_json("null", object, "here") is None


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("{", {}, r"Expected JSON in here, got '\{' \(Expecting"),
        ("", {}, "Expected JSON in here, got ''"),
        ("[" * 100_000, {}, "Expected JSON in here, got '"),
        ("9" * 10_000, int, "Expected JSON in here, got '9"),
        ("[]", {"a": int}, r"Expected an object in here, got \[\]"),
        ("null", {}, "Expected an object in here, got None"),
        ("{}", {"a": {"b": int}}, "Expected an object as `a` in here, got nothing"),
        ('{"a": {}}', {"a": {"b": int}}, "Expected a whole number as `a.b` in here, got nothing"),
        ('{"a": 1.5}', {"a": int}, "Expected a whole number as `a` in here, got 1.5"),
        ('{"a": true}', {"a": int}, "Expected a whole number as `a` in here, got True"),
        ('{"a": true}', {"a": float}, "Expected a number as `a`"),
        ('{"a": "1"}', {str: (float, None)}, "Expected a number or null as `a` in here, got '1'"),
        ('[{"a": 1}, {"a": []}]', [{"a": float}], r"Expected a number as `\[1\].a` in here, got \[\]"),
        ('{"a": {}}', {"a": [int]}, r"Expected a list as `a` in here, got \{\}"),
        ("1", bool, "Expected true or false in here, got 1"),
        ('{"a": null}', {"a": str}, "Expected a text as `a` in here, got None"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(text, shape, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, shape, "here")


def test_invalid_utf8_is_named_with_its_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"Expected JSON in .*a\.json, got bytes that are no UTF-8"):
        read_json(tmp_path / "a.json", {})
