"""Text sources and their cutting into chunks."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import byte_tokenizer

from svsk_jax.calibration.text import builtin_texts, cut_chunks, read_texts, tokenize


def test_builtin_parts_share_no_topic_and_make_up_the_whole():
    from pydoc_data.topics import topics

    calibration, evaluation = builtin_texts("calibration"), builtin_texts("evaluation")
    assert sorted(calibration + evaluation) == sorted(set(topics.values()))
    shared = set(calibration) & set(evaluation)
    assert not shared
    assert min(sum(map(len, calibration)), sum(map(len, evaluation))) > 150_000


def test_files_of_each_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    rows = [{"text": "one"}, {"text": ""}, {"text": "zwei ü"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_texts(str(tmp_path / "a.txt"), "calibration") == ["one\ntwo"]
    assert read_texts(str(tmp_path / "a.jsonl"), "calibration") == ["one", "zwei ü"]
    assert read_texts(str(tmp_path / "a.parquet"), "evaluation") == ["one", "zwei ü"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n', "'text' field"),
        ("a.jsonl", b"not json\n", "'text' field"),
        ("a.txt", b"\xff\xfe\x00bad", "UTF-8"),
        ("a.txt", b"", "no text"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / name), "calibration")


def test_a_missing_source_says_what_there_is():
    with pytest.raises(ValueError, match="no such file; give 'builtin', 'wikitext' or the path"):
        read_texts("wikitexts", "calibration")


def test_texts_are_joined_by_a_blank_line():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenize(tokenizer, ["ab", "cd"])) == "ab\n\ncd"


def test_chunks_spread_evenly_over_the_text():
    ids = np.arange(100_000, dtype=np.int32)
    chunks = cut_chunks(ids, 100, 64, 256).ids
    assert chunks.shape == (100, 64)
    assert chunks[0, 0] == 0
    assert chunks[-1, -1] == 99_999
    assert (np.diff(chunks[:, 0]) >= 64).all()


@pytest.mark.parametrize(
    ("tokens", "context", "length"), [(1_000_000, 8192, 2048), (1_000_000, 512, 512), (61_716, 8192, 448)]
)
def test_length_follows_text_and_context(tokens, context, length):
    assert cut_chunks(np.zeros(tokens, np.int32), 128, None, context).ids.shape == (128, length)


def test_few_chunks_warn_and_too_few_fail_with_the_fix():
    with pytest.warns(UserWarning, match="only 39 chunks of 256"):
        chunks = cut_chunks(np.zeros(10_000, np.int32), 128, None, 8192)
    assert chunks.ids.shape == (39, 256)
    with pytest.raises(
        ValueError, match=r"holds 1000 tokens, .* at least 8 chunks of 256 .*smaller --chunk-length"
    ):
        cut_chunks(np.zeros(1000, np.int32), 128, None, 8192)
    with pytest.raises(ValueError, match="--chunk-length: expected 2 to 512"):
        cut_chunks(np.zeros(1000, np.int32), 128, 1024, 512)
