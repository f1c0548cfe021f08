"""A file of JSON lines that processes append to until they are killed."""

import json

from vlmq.formats import json_lines


def test_what_is_appended_is_read_in_order_and_every_line_is_json(tmp_path):
    file = tmp_path / "rows"
    assert list(json_lines.read(file)) == []
    values = [{"a": 1}, "two\nlines", [3]]
    for value in values:
        json_lines.append(file, value)
    assert list(json_lines.read(file)) == values
    assert [json.loads(line) for line in file.read_text().splitlines()] == values


def test_a_line_that_was_cut_short_is_no_value_and_spoils_none(tmp_path):
    file = tmp_path / "rows"
    json_lines.append(file, {"a": 1})
    with file.open("ab") as stream:
        stream.write(b'{"b": ')
    assert list(json_lines.read(file)) == [{"a": 1}]
    json_lines.append(file, {"c": 3})
    assert list(json_lines.read(file)) == [{"a": 1}, {"c": 3}]
