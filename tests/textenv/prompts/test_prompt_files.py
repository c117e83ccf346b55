"""Files of prompts: suffixes, encodings, references, and errors that name the place."""

import csv
import json

import pytest

from textenv import CharTokenizer, TextEnv
from textenv.checks.lines import MAX_CHARS
from textenv.prompts.prompts import read_rows


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path."""

    def make(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return make


@pytest.mark.parametrize("as_text", [False, True], ids=["path", "str"])
def test_jsonl(make_env, write, as_text):
    path = write("p.jsonl", '{"prompt": "ab", "n": 1}\n\n"cd"\n[5, 6]\n')
    prompts = make_env(str(path) if as_text else path).prompts
    assert prompts == ["ab", "cd", "ef"] and prompts[0].row["n"] == 1


def test_csv_with_its_own_limits(make_env, write):
    path = write("p.csv", 'prompt,max_new_tokens,note\n"a, b",2,x\nc,,y\n')
    prompts = make_env(path).prompts
    assert prompts == ["a, b", "c"] and [prompt.max_new_tokens for prompt in prompts] == [2, None]
    assert prompts[1].row["note"] == "y"


def test_plain_text_a_prompt_a_line(make_env, write):
    path = write("p.txt", "the film \n\n   \nthis phone\r\n")
    assert make_env(path).prompts == ["the film ", "this phone"]


@pytest.mark.parametrize("name", ["p.csv", "p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(write, name):
    text = '"a"\n' if name == "p.jsonl" else "a\nb\n"
    rows = read_rows(write(name, b"\xef\xbb\xbf" + text.encode()))
    assert rows == {"p.csv": [{"a": "b"}], "p.txt": ["a", "b"], "p.jsonl": ["a"]}[name]


def test_files_are_read_as_utf8(write):
    assert read_rows(write("p.txt", "你好 🙂\n")) == ["你好 🙂"]


def test_bad_json_is_named_by_its_line(write):
    with pytest.raises(ValueError, match=r"Expected JSON on line 3 of '.*p.jsonl'") as caught:
        read_rows(write("p.jsonl", '"a"\n\n{"prompt": \n'))
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


LONG = MAX_CHARS + 1
WORDS = {"gb18030": "你好", "utf-16": "你好", "utf-16-le": "ab", "cp1252": "été", "utf-8": "été"}


@pytest.mark.parametrize("encoding", WORDS)
@pytest.mark.parametrize("name", ["p.csv", "p.txt", "p.jsonl", "p.json", "p.CSV", "P.TXT", "p.JsonL", "p.JSON"])
def test_files_of_other_encodings_and_of_every_suffix(write, name, encoding):
    word = WORDS[encoding]
    texts = {
        "csv": f'prompt,n\r\n"{word}\n,",1\r\n{word},2\r\n',
        "txt": f"{word}\r\n\r\n{word}",
        "jsonl": f'{{"prompt": "{word}"}}\r\n"{word}"\r\n',
        "json": f'[{{"prompt": "{word}"}},\r\n"{word}"]',
    }
    rows = {
        "csv": [{"prompt": f"{word}\n,", "n": "1"}, {"prompt": word, "n": "2"}],
        "txt": [word, word],
        "jsonl": [{"prompt": word}, word],
        "json": [{"prompt": word}, word],
    }
    kind = name.partition(".")[2].lower()
    path = write(name, texts[kind].encode(encoding))
    assert read_rows(path, encoding) == rows[kind]
    if encoding != "utf-8":
        with pytest.raises(ValueError, match=rf"Expected .* in (row 1 of |line \d of )?'.*{name}'"):
            read_rows(path)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_of_another_encoding_is_no_part_of_the_text(write, encoding):
    assert read_rows(write("p.txt", "\ufeffab\ncd".encode(encoding)), encoding) == ["ab", "cd"]


@pytest.mark.parametrize(
    ("name", "content", "encoding", "message"),
    [
        ("p.jsonl", '"a"\n' + "[" * 100_000, "utf-8", "JSON on line 2 of .*, got one that is too deep to read"),
        ("p.jsonl", '"a"\n' + "1" * 5000, "utf-8", "Expected JSON on line 2 of .*: Exceeds the limit"),
        ("p.jsonl", f'"{"x" * LONG}', "utf-8", "lines of at most 4,000,000 .*, got a longer one: line 1 of .*p.jsonl"),
        ("p.txt", "a\n" + "x" * LONG, "utf-8", "got a longer one: line 2 of .*p.txt"),
        ("p.csv", "prompt\na\n" + "x" * LONG, "utf-8", "cells of at most 4,000,000 .* in row 2 of .*p.csv"),
        ("p.csv", 'prompt\n"' + "x\n" * LONG, "utf-8", "quotes closed, got field larger than .* in row 1 of .*p.csv"),
        (
            "p.csv",
            'prompt\n"a\nb"\nb,c',
            "utf-8",
            "Expected 1 cells, as the header has, got more in row 2 of '.*p.csv', line 4: put a cell with a comma in "
            "double quotes",
        ),
        ("p.txt", b"\xff\xfe", "utf-8", "Expected UTF-8 in '.*p.txt', got the byte 0xff in line 1: .*='utf-16'"),
        (
            "p.csv",
            b"prompt\n" + b"ab\r\n" * 9000 + b"caf\xe9\n",  # 36 kB of whole lines, then Windows-1252
            "utf-8",
            "Expected UTF-8 in '.*p.csv', got the byte 0xe9 in line 9002: save the file as UTF-8, or name its "
            r"encoding, as in encoding='gb18030' \(Chinese\) or encoding='cp1252' \(Windows\)",
        ),
        ("p.txt", b"ab\ncaf\xe9", "utf-8", "Expected UTF-8 in '.*', got the byte 0xe9 in line 2"),  # the last byte
        ("p.txt", b"ab\rcd\n\xff\n", "gb18030", "Expected GB18030 in '.*', got the byte 0xff in line 3"),
        ("p.txt", "abcdef", "utf-16", "Expected UTF-16 in '.*', got the byte 0x61 in line 1"),
        ("p.txt", "ab\ncd".encode("utf-16-le"), "utf-8", "text in line 1 of '.*', got a NUL .*encoding='utf-16-le'"),
        ("p.csv", "a,b\nc,d".encode("utf-16-le"), "utf-8", "text in row 1 of '.*p.csv', got a NUL character"),
        ("p.txt", "ab", "gb2313", "`encoding` to be a name that Python knows, .*, got 'gb2313'"),
        ("p.json", '{"prompt": "a"}', "utf-8", "a list of rows in '.*p.json', got {'prompt': 'a'}. .*ends in .jsonl"),
        ("p.json", '"a"\n"b"', "utf-8", r"JSON on '.*p.json': Extra data: line 2 .*on each line ends in .jsonl"),
    ],
)
def test_unreadable_content_is_named_by_its_place(write, name, content, encoding, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(name, content), encoding)


def test_long_cells_and_lines_are_read(write):
    """A cell may exceed the csv module's limit, which is restored afterwards."""
    before, long = csv.field_size_limit(), "x" * 1_000_000
    assert before < len(long)
    assert read_rows(write("p.csv", f"prompt\n{long}\n")) == [{"prompt": long}]
    assert read_rows(write("p.txt", f"{long}\r\nb")) == [long, "b"]
    assert csv.field_size_limit() == before


def test_another_suffix_is_refused(write):
    with pytest.raises(ValueError, match=r"ends in .jsonl, .json, .csv or .txt, got '.*p.parquet'"):
        read_rows(write("p.parquet", "a"))


def test_an_env_reads_a_file_of_its_encoding(write):
    path = write("p.csv", "prompt\n你好\n".encode("gb18030"))
    env = TextEnv(path, CharTokenizer("你好"), reward=lambda prompt, preds, done: 0.0, encoding="gb18030")
    assert env.prompts == ["你好"] and env.prompts[0].ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "n,prompt\n1,ab\n2\n", "Expected prompt 1 to be a text, .* got None. It is row 2 of '.*p.csv'"),
        ("p.jsonl", '"a"\n\n{"prompt": null}', "Expected prompt 1 to .* got None. It is row 2 of '.*p.jsonl'"),
        ("p.jsonl", '"so \\ud83d broken"', r"whole characters in prompt 0, got a lone .*\\ud83d.* It is row 1 of '.*p"),
    ],
)
def test_a_prompt_that_cannot_work_is_named_by_its_row(make_env, write, name, text, message):
    with pytest.raises(ValueError, match=message):
        make_env(write(name, text))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("null", "references in the column 'answers' of prompt 1, got None: .* It is row 2 of '.*p.jsonl'"),
        ('["x", null]', "references in the column 'answers' of prompt 1, got None: .* It is row 2 of '.*p.jsonl'"),
        ('"so \\ud83d"', "characters in the column 'answers' of prompt 1, got a lone .* It is row 2 of '.*p.jsonl'"),
    ],
)
def test_references_of_a_file_are_named_by_their_row(make_env, write, answers, message):
    path = write("p.jsonl", f'{{"prompt": "a", "answers": 7}}\n{{"prompt": "b", "answers": {answers}}}\n')
    with pytest.raises(ValueError, match=message):
        make_env(path, references_column="answers")
