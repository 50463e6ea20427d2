import numpy as np
import pytest

from svsk_jax.evaluation.windows import bos_added_by, cut_windows, encode_texts


def test_gptq_windows_by_hand():
    windows = cut_windows(np.arange(11, dtype=np.int32), "gptq", context=100, window=4)
    np.testing.assert_array_equal(windows.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert (windows.first, windows.scored, windows.used, windows.available) == (0, 6, 8, 11)


def test_llama_cpp_windows_by_hand():
    ids = np.arange(17, dtype=np.int32)
    windows = cut_windows(ids, "llama.cpp", context=100, window=8)
    np.testing.assert_array_equal(windows.tokens, [list(range(8)), list(range(8, 16))])
    # Predictions at positions 4, 5, 6 of tokens 5, 6, 7.
    assert (windows.first, windows.scored) == (4, 6)
    started = cut_windows(ids, "llama.cpp", context=100, window=8, bos_id=99)
    np.testing.assert_array_equal(started.tokens[:, 0], [99, 99])
    np.testing.assert_array_equal(started.tokens[:, 1:], windows.tokens[:, 1:])
    np.testing.assert_array_equal(ids, np.arange(17))


def test_default_lengths_context_and_limit():
    ids = np.zeros(10_000, np.int32)
    assert cut_windows(ids, "gptq", context=4096).tokens.shape == (4, 2048)
    assert cut_windows(ids, "gptq", context=1000).tokens.shape == (10, 1000)
    llama = cut_windows(ids, "llama.cpp", context=4096)
    assert (llama.tokens.shape, llama.first, llama.scored) == ((19, 512), 256, 19 * 255)
    limited = cut_windows(ids, "llama.cpp", context=4096, max_tokens=1100)
    assert (limited.used, limited.available) == (1024, 10_000)
    assert cut_windows(ids, "gptq", context=4096, bos_id=7).tokens.max() == 0


def test_mistakes_are_told_with_numbers():
    ids = np.zeros(300, np.int32)
    with pytest.raises(ValueError, match=r"needs 512 tokens for one window, found 300.*smaller window"):
        cut_windows(ids, "llama.cpp", context=4096)
    with pytest.raises(ValueError, match="max_tokens 100 is less than one gptq window of 300"):
        cut_windows(ids, "gptq", context=300, max_tokens=100)
    with pytest.raises(ValueError, match="at least 4 tokens, got 2"):
        cut_windows(ids, "gptq", context=2)


def test_texts_are_joined_by_a_blank_line_and_tokenized_once(byte_tokenizer):
    plain, starting = byte_tokenizer(), byte_tokenizer(bos=True)
    texts = ["ab", "çd"]
    ids = encode_texts(plain, texts)
    assert ids.dtype == np.int32
    assert plain.decode(ids) == "ab\n\nçd"
    np.testing.assert_array_equal(encode_texts(starting, texts), [starting.bos_token_id, *ids])
    assert bos_added_by(plain) is None
    assert bos_added_by(starting) == starting.bos_token_id
