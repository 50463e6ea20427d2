"""A model in memory as a `ModelSource`, and a byte-level tokenizer, for tests of what comes after
conversion."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert.names import source_names
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import layer_parameters, random_parameters

TINY = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=88,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
"""A small Llama whose sizes divide nothing in particular."""
SQUARE = dataclasses.replace(TINY, hidden_size=32, intermediate_size=32, num_heads=4, num_kv_heads=4)
"""All linears of one shape, for which quantizing is compiled once."""


def write_checkpoint(folder: Path, seed: int, config: ModelConfig = TINY) -> Path:
    """Fill a Hugging Face folder with a random model; returns it."""
    names = source_names(config, "hf")
    parameters = random_parameters(config, seed)
    save_file(
        {names[path].hf: np.asarray(value) for path, value in parameters.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character, space and line break, and <end>: 97 in all."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<end>": 96}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


class MemorySource:
    """Random parameters of a configuration."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config = config
        self.parameters = {path: np.asarray(value) for path, value in random_parameters(config, seed).items()}
        self.description = f"memory:{seed}"
        self.generation_config: dict[str, Any] = {"eos_token_id": 96}

    @property
    def hf_config(self) -> dict[str, Any]:
        return self.config.to_hf()

    def outer(self, dtype: Any) -> dict[str, Any]:
        return {
            path: value.astype(dtype)
            for path, value in self.parameters.items()
            if not path.startswith("layers.")
        }

    def layer(self, index: int, dtype: Any) -> dict[str, Any]:
        return {path: value.astype(dtype) for path, value in layer_parameters(self.parameters, index).items()}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_tokenizer()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, value in sorted(self.parameters.items()):
            digest.update(path.encode() + value.tobytes())
        return digest.hexdigest()

    def local_path(self) -> Path:
        raise NotImplementedError("in memory")
