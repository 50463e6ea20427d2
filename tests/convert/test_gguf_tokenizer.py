"""Tokenizers rebuilt from GGUF metadata, against the originals and against facts about SmolLM2."""

import itertools
import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from convert import open_checkpoint
from convert.gguf_tokenizer import gguf_tokenizer
from convert.pre_tokenizers import SPLITTINGS

TEXTS = [
    "Hello, world! It's 12345 o'clock; we'll see.",
    "naïve façade — 你好，世界 🙂👩‍🔬 Ωμέγα",
    "def f(x):\n    return x**2  # ok\n\n\n\tpass   ",
    "   leading and trailing   ",
    "",
    "price: $3.14159 (≈π) 50% off!!!\r\nnext ½ Ⅷ ٣",
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return open_checkpoint(str(smollm2_gguf)).tokenizer()


@pytest.mark.smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2, text):
    assert smollm2.decode(smollm2(text)["input_ids"]) == text


@pytest.mark.smollm2
def test_smollm2_facts(smollm2):
    assert smollm2("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [0, 1, 2]
    assert smollm2.convert_ids_to_tokens(smollm2("12345")["input_ids"]) == list("12345")
    assert smollm2.convert_ids_to_tokens(smollm2("Hello, world!")["input_ids"]) == [
        "Hello",
        ",",
        "Ġworld",
        "!",
    ]
    chat = smollm2.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert (smollm2.eos_token_id, smollm2.pad_token_id, smollm2.bos_token_id) == (2, 2, 1)


@pytest.mark.smollm2
def test_smollm2_saved(smollm2, smollm2_gguf, tmp_path):
    smollm2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(open_checkpoint(str(smollm2_gguf)).hf_config))
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert [again(text)["input_ids"] for text in TEXTS] == [smollm2(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == smollm2.chat_template


def metadata_of(tokenizer: Tokenizer, **extra) -> dict:
    """What llama.cpp's converter would store of a byte-level tokenizer."""
    data = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    special = {token["content"]: 3 if token["special"] else 4 for token in data["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def byte_level(pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = level
    else:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize(("pre", "pattern"), [("gpt-2", None), ("qwen2", QWEN2)])
def test_byte_level_same_ids(tmp_path, pre, pattern):
    original = byte_level(pattern)
    rebuilt = gguf_tokenizer(
        metadata_of(original, pre=pre, eos_token_id=original.token_to_id("<|end|>")), where="x"
    )
    texts = [*TEXTS, "a<think>b<|end|>c", "cafe\u0301"]
    expected = [original.encode(text).ids for text in texts]
    assert [rebuilt(text)["input_ids"] for text in texts] == expected
    rebuilt.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert [again(text)["input_ids"] for text in texts] == expected
    assert again.decode(again("a<think>b<|end|>")["input_ids"], skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_splitting_keeps_the_text(pre):
    rebuilt = gguf_tokenizer(metadata_of(byte_level(None), pre=pre, add_bos_token=False), where="x")
    for text in TEXTS:
        assert rebuilt.decode(rebuilt(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["ĠI", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4"]),
        ("gpt-2", ["ĠI", "'ll", "Ġpay", "Ġ1234"]),
        ("llama-bpe", ["ĠI", "'ll", "Ġpay", "Ġ", "123", "4"]),
        ("qwen2", ["ĠI", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4"]),
        ("tekken", ["ĠI", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_splittings(pre, pieces):
    found = SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(" I'll pay 1234")
    assert [piece for piece, _ in found] == pieces


def test_bos_is_added():
    original = byte_level(None)
    bos = original.token_to_id("<|end|>")
    metadata = metadata_of(original, pre="llama-bpe", bos_token_id=bos)
    assert gguf_tokenizer(metadata, where="x")("ab")["input_ids"][0] == bos
    plain = gguf_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False}, where="x")
    assert plain("ab")["input_ids"] == original.encode("ab").ids


def sentencepiece(**extra) -> dict:
    pieces = [*"▁helowrd", "he", "ll", "hell", "▁hello", "hello", "▁w", "or", "▁wor", "ld", "lo", "▁▁", "el"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    count = len(tokens)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(count - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def joined_by_score(text: str, metadata: dict) -> list[str]:
    """SentencePiece as defined: join the neighbours whose union scores highest, leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens[259:], metadata["tokenizer.ggml.scores"][259:], strict=True))
    symbols = list("▁" * bool(text) + text.replace(" ", "▁"))
    while True:
        unions = [left + right for left, right in itertools.pairwise(symbols)]
        known = [union for union in unions if union in scores]
        if not known:
            break
        at = unions.index(max(known, key=scores.__getitem__))
        symbols[at : at + 2] = [unions[at]]
    spelled = [
        [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        for symbol in symbols
    ]
    return list(itertools.chain.from_iterable(spelled))


def test_sentencepiece(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(), where="x")
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"]) == ["<s>", "▁hello"]
    for text in (*TEXTS, "hello world", "helloworld  hell or lower lolelo", "éhé"):
        assert tokenizer.tokenize(text) == joined_by_score(text, sentencepiece())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    bare = gguf_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False), where="x")
    assert bare.convert_ids_to_tokens(bare("hello")["input_ids"]) == ["hello"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "unknown tokenizer.ggml.model 'bert'; known are gpt2, llama"),
        ({"pre": "novel"}, "unknown tokenizer.ggml.pre 'novel'; known are .*qwen2"),
        ({"merges": ["zz yy"]}, "do not fit together"),
        ({"merges": ["onlyone"]}, "expected pairs"),
        ({"eos_token_id": 100000}, "outside the vocabulary"),
        ({"tokens": ["a", "a"]}, "1 duplicates"),
        ({"tokens": None}, "no vocabulary"),
    ],
)
def test_errors(change, message):
    metadata = metadata_of(byte_level(None), pre="gpt-2") | {
        f"tokenizer.ggml.{key}": value for key, value in change.items()
    }
    with pytest.raises(ValueError, match=f"file.gguf: .*{message}"):
        gguf_tokenizer(metadata, where="file.gguf")
