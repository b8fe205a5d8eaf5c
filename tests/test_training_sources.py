"""Rows of real files: lines, documents, Parquet, ArrayRecord and packed arrays, and what is wrong with them."""

import gzip
import json
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_fixtures import write_jsonl

from jaxmodels.training import sources
from jaxmodels.training.sources import read_rows


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=6), max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    block=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_lines_of_text(tmp_path_factory, lines, end, closed, block):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes((end.join(lines) + (end if closed else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        rows = read_rows(path)
    wanted = [(i, line) for i, line in enumerate(lines, 1) if line]
    assert [row["text"] for row in rows] == [line for _, line in wanted]
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}, line {number}" for number, _ in wanted]


def test_files_of_every_format(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"größe {i}", "label": i, "ids": list(range(i))} for i in range(7)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    for suffix in ("jsonl", "parquet", "array_record"):
        found = read_rows(tmp_path / f"a.{suffix}")
        assert list(found) == rows
        assert [found[i] for i in (6, 0, 3, 6)] == [rows[i] for i in (6, 0, 3, 6)]
    assert read_rows(tmp_path / "a.jsonl", "document")[0]["text"] == (tmp_path / "a.jsonl").read_text()
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "b.jsonl", rows[:2])
    write_jsonl(tmp_path / "more" / "c.jsonl", [])
    write_jsonl(tmp_path / "more" / "d.jsonl", rows[2:])
    for paths in (tmp_path / "more", str(tmp_path / "more" / "*.jsonl"), [tmp_path / "more" / "b.jsonl", tmp_path / "more" / "d.jsonl"]):
        assert list(read_rows(paths)) == rows
    assert read_rows(tmp_path / "more").where(2) == f"{tmp_path}/more/d.jsonl, line 1"


def test_marks_and_packed_files(tmp_path, monkeypatch):
    """A byte order mark is no text; .gz files have the rows of what they pack; ~ is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    content = '\ufeff{"text": "größe"}\r\n\n{"text": "b"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    for path in ("~/a.jsonl", "~/b.jsonl.gz"):
        rows = read_rows(path)
        assert list(rows) == [{"text": "größe"}, {"text": "b"}] and rows.where(1).endswith("line 3")
    assert len(read_rows(tmp_path)) == 4
    assert read_rows(tmp_path / "a.jsonl", "document")[0]["text"].startswith("{")
    (tmp_path / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf\none\n")
    assert len(read_rows(tmp_path / "empty.txt.gz")) == 0 and list(read_rows(tmp_path / "mark.txt")) == [{"text": "one"}]
    for name, broken in (("cut", gzip.compress(b"text\n" * 99)[:-9]), ("none", b"text")):
        (tmp_path / f"{name}.txt.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}.txt.gz: is not a file of format text"):
            read_rows(tmp_path / f"{name}.txt.gz")


def test_broken_files_are_named(tmp_path, monkeypatch):
    for name in ("a.parquet", "a.array_record", "a.npy"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=rf"{name}: is not a file of format"):
            read_rows(tmp_path / name)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"plain.npy: is not a file of format npy \(holds plain float64"):
        read_rows(tmp_path / "plain.npy")
    writer = ArrayRecordWriter(str(tmp_path / "b.array_record"), "group_size:1")
    writer.write(b"\x08\x01\x12")
    writer.close()
    with pytest.raises(ValueError, match=r"b.array_record, row 0: a record of 3 bytes is neither a JSON object nor safetensors"):
        read_rows(tmp_path / "b.array_record")[0]
    with pytest.raises(FileNotFoundError, match=r"nowhere/\*\.jsonl: no such file"):
        read_rows(str(tmp_path / "nowhere" / "*.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv: the suffix names no format; give one of text, document, jsonl"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="format 'csv' is not known"):
        read_rows(tmp_path / "a.csv", "csv")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(9)]}), tmp_path / "page.parquet", row_group_size=5)
    data = bytearray((tmp_path / "page.parquet").read_bytes())
    data[4:40] = bytes(byte ^ 0x5A for byte in data[4:40])
    (tmp_path / "page.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]*page.parquet, row 3: row group 0 cannot be read: [^\n]*$"):
        read_rows(tmp_path / "page.parquet")[3]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="read by pyarrow, which is not installed: pip install pyarrow"):
        read_rows(tmp_path / "a.parquet")
