"""A transformers tokenizer from the vocabulary in a GGUF file, without torch."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from convert.gguf_config import CONTROL
from convert.pre_tokenizers import SPLITTINGS

UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6
KEY = "tokenizer.ggml."


def gguf_tokenizer(metadata: Mapping[str, Any], *, where: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer; a saved copy gives the same ids. `where` heads error messages.

    Raises:
        ValueError: no vocabulary, an unknown tokenizer model or pre-tokenizer, or an inconsistent vocabulary.
    """
    tokens, model = metadata.get(KEY + "tokens"), metadata.get(KEY + "model")
    if not isinstance(tokens, list) or model is None:
        raise ValueError(
            f"{where}: no vocabulary ({KEY}model, {KEY}tokens); use a GGUF file that carries its tokenizer"
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{where}: {KEY}tokens has {len(tokens) - len(set(tokens))} duplicates; download it again"
        )
    types = metadata.get(KEY + "token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{where}: {len(types)} entries in {KEY}token_type for {len(tokens)} tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise ValueError(f"{where}: unknown {KEY}model {model!r}; known are {', '.join(builders)}")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    try:
        special = {name: _token(metadata, tokens, key) for name, key in names.items()}
        tokenizer, add_bos = builders[model](metadata, tokens, types)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception, for example on a merge of unknown tokens
        raise ValueError(f"{where}: its vocabulary and merges do not fit together: {error}") from error
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([added])
    _add_template(
        tokenizer,
        special["bos"] if metadata.get(KEY + "add_bos_token", add_bos) else None,
        special["eos"] if metadata.get(KEY + "add_eos_token", False) else None,
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length", int(1e30)),
        **{f"{name}_token": token for name, token in special.items() if token is not None},
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    name = metadata.get(KEY + "pre", "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise ValueError(f"unknown {KEY}pre {name!r}; known are {', '.join(sorted(SPLITTINGS))}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get(KEY + "merges") or []]
    broken = [" ".join(merge) for merge in merges if len(merge) != 2]
    if broken:
        raise ValueError(f"{KEY}merges: expected pairs of tokens, found {broken[0]!r}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting.ignore_merges))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Tokenizer, bool]:
    scores = metadata.get(KEY + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"{KEY}scores: expected {len(tokens)} numbers")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(tokens, scores, types)
    unknown = _token(metadata, tokens, "unknown") or next(
        (token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None
    )
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(KEY + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins neighbours by the score of their union; every way to halve a piece is a merge."""
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    ranked = sorted(pieces, key=lambda token: -pieces[token])
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _token(metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    index = metadata.get(f"{KEY}{name}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ValueError(f"{KEY}{name}_token_id is {index!r}, outside the vocabulary of {len(tokens)}")
    return tokens[index]


def _add_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    first, last = [bos] if bos else [], [eos] if eos else []
    if not first and not last:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[
            *first,
            "$A",
            *last,
            *(f"{token}:1" for token in first),
            "$B:1",
            *(f"{token}:1" for token in last),
        ],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )
