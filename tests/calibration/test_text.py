"""Text sources and their cutting into chunks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import MemorySource, byte_tokenizer

from convert.load import load_decoder
from svsk_jax.calibration.chunks import calibration_chunks
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.mixture import cut_chunks, parse_mixture
from svsk_jax.calibration.self_text import sample_tokens
from svsk_jax.calibration.text import read_texts, tokenize


def test_documentation_is_halved_by_topic():
    from pydoc_data.topics import topics

    calibration, evaluation = (read_texts("documentation", part) for part in ("calibration", "evaluation"))
    assert sorted(calibration + evaluation) == sorted(set(topics.values()))
    assert not set(calibration) & set(evaluation)
    assert min(sum(map(len, calibration)), sum(map(len, evaluation))) > 150_000


def test_code_is_halved_by_module():
    calibration, evaluation = (read_texts("code", part) for part in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert min(sum(map(len, calibration)), sum(map(len, evaluation))) > 1_000_000
    assert any("import" in text for text in calibration)


def test_builtin_is_documentation_and_code_in_equal_parts():
    texts = read_texts("builtin", "evaluation")
    documentation = read_texts("documentation", "evaluation")
    assert texts[: len(documentation)] == documentation
    rest = sum(map(len, texts[len(documentation) :]))
    assert rest == sum(map(len, documentation))


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
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl.*nested more than 200 deep"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl.*found 5"),
        ("a.parquet", b"PAR1 damaged PAR1", r"a\.parquet"),
        ("a.txt", b"\xff\xfe\x00bad", "UTF-8"),
        ("a.txt", b"", "no text"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / name), "calibration")


def test_a_missing_source_says_what_there_is():
    with pytest.raises(ValueError, match=r"no such file; give 'builtin', .*'wikitext'.* or the path"):
        read_texts("wikitexts", "calibration")


def test_texts_are_joined_by_a_blank_line():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenize(tokenizer, ["ab", "cd"])) == "ab\n\ncd"


def cut(sources, chunks, length, context=8192):
    """Cut chunks of sources given as {name: (weight, tokens)}."""
    weights = {name: float(weight) for name, (weight, _) in sources.items()}
    return cut_chunks(
        weights, lambda name, wanted: sources[name][1], chunks=chunks, length=length, context=context
    )


def test_chunks_spread_evenly_over_the_text():
    ids = np.arange(100_000, dtype=np.int32)
    chunks = cut({"a": (1, ids)}, 100, 64).ids
    assert chunks.shape == (100, 64)
    assert chunks[0, 0] == 0
    assert chunks[-1, -1] == 99_999
    assert (np.diff(chunks[:, 0]) >= 64).all()


def test_sources_share_by_weight_and_any_run_is_mixed():
    one, two = np.full(10_000, 1, np.int32), np.full(10_000, 2, np.int32)
    chunks = cut({"one": (3, one), "two": (1, two)}, 100, 64)
    assert chunks.counts == {"one": 75, "two": 25}
    assert abs(int((chunks.ids[:40, 0] == 2).sum()) - 10) <= 1


def test_a_text_too_short_for_its_share_is_not_repeated():
    ids = np.arange(1000, dtype=np.int32)
    chunks = cut({"long": (1, np.arange(50_000, dtype=np.int32) + 5000), "short": (1, ids)}, 128, 64)
    assert chunks.counts == {"long": 64, "short": 15}
    short = chunks.ids[chunks.ids[:, 0] < 1000]
    assert len(np.unique(short)) == short.size


@pytest.mark.parametrize(("context", "length"), [(8192, 512), (256, 256)])
def test_length_is_512_or_the_context(context, length):
    assert cut({"a": (1, np.zeros(100_000, np.int32))}, 128, None, context).ids.shape == (128, length)


def test_few_chunks_warn_and_too_few_fail_with_the_fix():
    with pytest.warns(UserWarning, match="only 19 chunks of 512"):
        assert cut({"a": (1, np.zeros(10_000, np.int32))}, 128, None).ids.shape == (19, 512)
    with pytest.raises(
        ValueError, match=r"holds 1000 tokens, .* at least 8 chunks of 512 .*smaller --chunk-length"
    ):
        cut({"a": (1, np.zeros(1000, np.int32))}, 128, None)
    with pytest.raises(ValueError, match="--chunk-length: expected 2 to 512"):
        cut({"a": (1, np.zeros(1000, np.int32))}, 128, 1024, 512)


def test_mixtures_are_parsed_and_mistakes_named():
    assert parse_mixture(["code", "notes.txt=2.5", "a=b.txt"]) == {"code": 1, "notes.txt": 2.5, "a=b.txt": 1}
    for texts, message in [
        ([], "at least one"),
        (["code=0"], "positive weight"),
        (["code=-1"], "positive weight"),
        (["code", "code=2"], "named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_mixture(texts)


class Rows(list):
    """A streamed data set, as far as it is used."""

    def take(self, count):
        return self[:count]

    def __getitem__(self, key):
        return [row["text"] for row in self] if key == "text" else super().__getitem__(key)


def test_hub_sources_read_their_own_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None, *, split, streaming):
        asked.append((name, split))
        if "wikitext" in name:
            return Rows([{"text": "a\n"}, {"text": "b\n"}])
        if "codeparrot" in name:
            return Rows([{"content": f"x = {index}"} for index in range(4)])
        return Rows([{"messages": [{"content": "Hi"}, {"content": "Hello"}]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_texts("wikitext", "calibration") == ["a\nb\n"]
    assert read_texts("github", "calibration") == ["x = 0", "x = 2"]
    assert read_texts("github", "evaluation") == ["x = 1", "x = 3"]
    assert read_texts("chat", "evaluation") == ["Hi\n\nHello"]
    assert [split for _, split in asked] == ["train", "train", "train", "test_sft"]


def test_the_mixture_goes_on_without_the_hub(tiny_config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = MemorySource(tiny_config)
    calibration = CalibrationConfig(chunks=66, chunk_length=32)
    with pytest.warns(UserWarning, match="without wikitext, github, chat"):
        chunks = calibration_chunks(source, calibration, jnp.float32)
    assert chunks.counts == {"documentation": 22, "code": 22, "self": 22}
    assert chunks.ids.shape == (66, 32)
    named = CalibrationConfig(calib=("wikitext",), chunks=64, chunk_length=32)
    with pytest.raises(ConnectionError, match="Without the hub, use"):
        calibration_chunks(source, named, jnp.float32)


def test_the_model_writes_the_same_text_for_the_same_seed(tiny_config):
    source = MemorySource(tiny_config)
    first, again, other = (sample_tokens(source, 300, seed, jnp.float32) for seed in (0, 0, 1))
    assert len(first) >= 300
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_sampled_text_follows_the_model(tiny_config):
    """The mean NLL of what the model samples is its mean entropy."""
    source = MemorySource(tiny_config)
    rows = sample_tokens(source, 60_000, 0, jnp.float32).reshape(-1, tiny_config.max_position_embeddings - 1)
    starts = np.full((len(rows), 1), 96, np.int32)
    model = load_decoder(source, jnp.float32)
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(np.concatenate([starts, rows], 1)))
    log_p = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, jnp.asarray(rows)[..., None], axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    error = float(nll.std()) / np.sqrt(rows.size)
    assert abs(float(nll.mean() - entropy.mean())) < 4 * error
