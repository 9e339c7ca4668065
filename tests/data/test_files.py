# SPDX-License-Identifier: Apache-2.0
"""Rows of files, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import re

import pytest

from lightning_safety.data.files import read_rows


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_json_lines_keep_their_line_numbers(write):
    path = write("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": "b\\nc"}\n')
    assert [(row.values, row.place) for row in read_rows(path)] == [
        ({"prompt": "a"}, f"{path}:1"),
        ({"prompt": "b\nc"}, f"{path}:3"),
    ]


def test_line_separators_inside_of_text_do_not_end_a_row(write):
    path = write("rows.jsonl", json.dumps({"prompt": "a\u2028b\x0bc\x85d"}, ensure_ascii=False))
    assert [row.values["prompt"] for row in read_rows(path)] == ["a\u2028b\x0bc\x85d"]


def test_csv_reads_quotes_commas_and_line_breaks(write):
    path = write("rows.csv", 'prompt,response\n"a, ""b""\nc",d\ne,\n')
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"prompt": 'a, "b"\nc', "response": "d"}, {"prompt": "e", "response": ""}]
    assert rows[0].place == f"{path}:3"


def test_json_reads_a_list_of_objects(write):
    assert [row.values for row in read_rows(write("rows.JSON", '[{"prompt": "a"}, {"prompt": "b"}]'))] == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(write, name):
    content = {"rows.jsonl": '{"prompt": "a"}', "rows.json": '[{"prompt": "a"}]', "rows.csv": "prompt\na\n"}[name]
    assert [row.values for row in read_rows(write(name, b"\xef\xbb\xbf" + content.encode()))] == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            '{"prompt": "a"}\n{"prompt": \n',
            r"rows.jsonl:2 expected to be a JSON object but Expec",
        ),
        ("rows.jsonl", '{"prompt": "a"}\n["b"]\n', r"rows.jsonl:2 expected to be a JSON object but is a list"),
        ("rows.jsonl", "null\n", r"rows.jsonl:1 expected to be a JSON object but is null"),
        ("rows.json", '[{"prompt": "a"},\n "b"]', r"rows.json, item 2 expected to be a JSON object but is a string"),
        ("rows.json", '{"prompt": "a"}', r"expected to hold a JSON list of objects but holds an object"),
        ("rows.json", "[\n\n", r"rows.json:3 expected to be JSON"),
        ("rows.csv", "prompt,response\na,b,c\n", r"rows.csv:2 expected to have 2 cells like the header"),
        ("rows.csv", "prompt,response\na\n", r"rows.csv:2 expected to have 2 cells like the header"),
        ("rows.csv", 'prompt\n"a" b\n', r"rows.csv:2 expected to be CSV"),
        ("rows.jsonl", b'{"prompt": "\xff"}', r"rows.jsonl expected to be UTF-8 text"),
        ("rows.txt", "a", r"\.jsonl, \.json, \.csv file but got .*rows\.txt"),
    ],
)
def test_what_cannot_be_read_is_named(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_rows(write(name, content)))


def test_a_missing_file_names_the_closest(write):
    path = write("prompts.jsonl", "")
    with pytest.raises(FileNotFoundError, match=re.escape("there is no such file. Did you mean `prompts.jsonl`?")):
        list(read_rows(path.with_name("promts.jsonl")))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        list(read_rows(tmp_path))
