import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from svsk_jax.runtime.detokenize import Detokenizer


def pieces_of(tokenizer, ids, prompt_ids=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    # Hypothesis also tries literals of the code; special tokens are not shown.
    special = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    assert "".join(pieces) == re.sub(special, "", text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer("x😀éab")["input_ids"]
    # x, F0, 9F, 98·80, C3, A9, ab
    assert len(ids) == 7
    assert pieces_of(tokenizer, ids) == ["x", "", "", "😀", "", "é", "ab", ""]


def test_a_character_left_unfinished_is_never_shown(tokenizer):
    ids = tokenizer("ok😀")["input_ids"][:-1]
    pieces = pieces_of(tokenizer, ids)
    assert pieces == ["o", "k", "", "", ""]


def test_random_ids_join_to_their_decoding(tokenizer):
    ids = np.random.default_rng(0).integers(0, 262, 300).tolist()
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(tokenizer, ids)) == decoded.rstrip("\ufffd")
    assert "\ufffd" in decoded


def test_special_tokens_are_not_shown(tokenizer):
    ids = tokenizer("a<end>b")["input_ids"]
    assert pieces_of(tokenizer, ids) == ["a", "", "b", ""]


def test_the_space_between_prompt_and_text_survives_sentencepiece():
    words = {"▁The": 0, "▁cat": 1, "▁sat": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1, 2]) == "cat sat"
    assert pieces_of(tokenizer, [1, 2], prompt_ids=[0]) == [" cat", " sat", ""]
    assert pieces_of(tokenizer, [1, 2]) == ["cat", " sat", ""]
