"""JSON from somewhere: read within bounds, or refused by name."""

import json
import os
import tracemalloc

import pytest

from medmoco.errors import UserError
from medmoco.json_file import MAX_DEPTH, parse_json, read_json, read_object
from medmoco.metrics_log import read_records


def written(folder, content):
    path = folder / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_content_comes_back(tmp_path):
    content = {"a": [1, 2.5, None, True, 'b"[{', "c\\"], "d": {"e": -3}}
    assert read_json(written(tmp_path, json.dumps(content))) == content


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert read_json(written(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands twice in one object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b"[1e999]", "beyond float64, 1e999"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5,000 digits"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
        (b'"' + b"\\" * 200_001, "Unterminated string"),
        (b"[" * 70 + b'"\\' * 100_000, "nested more than 64 deep"),
        (b" " * (17 << 20), "expected a JSON file of 16,777,216 bytes at most"),
    ],
)
def test_what_is_refused_is_named(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


def test_a_text_of_strings_takes_little_memory():
    text = json.dumps({"a": "x" * (15 << 20), "b": [[]] * 100, "c": '"\\' * 1000})
    tracemalloc.start()
    parse_json("file", text)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * len(text)


def test_a_pipe_and_a_device_are_refused(tmp_path):
    """Neither is waited for nor read without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(UserError, match=f"{name}: expected a readable .* not a regular file"):
            read_json(tmp_path / name)


def test_brackets_within_strings_do_not_nest(tmp_path):
    content = {"a": ["[" * 200, '{"' * 200, "\\"]}
    assert read_json(written(tmp_path, json.dumps(content))) == content
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read_json(written(tmp_path, deepest)) is not None


def test_nan_is_null_where_that_is_asked_for(tmp_path):
    path = written(tmp_path, '{"a": NaN, "b": [Infinity]}')
    assert read_json(path, nan_is_null=True) == {"a": None, "b": [None]}


def test_another_kind_than_an_object_is_named(tmp_path):
    with pytest.raises(UserError, match=r"file\.json: expected a JSON object, got list"):
        read_object(written(tmp_path, "[1]"))


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="expected a readable JSON file"):
            read_json(path)


def test_text_of_many_open_strings_takes_no_quadratic_time():
    text = "[" * 65 + '"\\"' * 1_000_000  # seconds stand between linear and quadratic
    with pytest.raises(UserError):
        parse_json("text", text)


def test_lines_that_are_no_records_are_left_out(tmp_path):
    record = {"stage": "finetune", "encoder": "scratch", "epoch": 1, "step": 2, "loss": 0.5}
    bad = ("", "{", "[1]", '{"stage": []}', '{"stage": "a", "step": "1", "epoch": 1}', "[" * 9999)
    lines = "\n".join([*bad, json.dumps(record), '{"stage": "cut'])
    path = written(tmp_path, b"\xff\n" + lines.encode())
    assert [found for _, found in read_records(path)] == [record]
    assert read_records(tmp_path / "none") == []
