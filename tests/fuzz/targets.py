"""What is fuzzed: for each kind of input, an honest one, how it is damaged, and everything that reads it."""

import dataclasses
import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf_text import encode_gguf, laid_out
from mutations import damaged_bytes, damaged_json, damaged_json_bytes, damaged_safetensors
from support import TINY, MemorySource, byte_tokenizer, write_checkpoint

from convert.names import source_names
from svsk_jax.calibration import store
from svsk_jax.calibration.statistics import StoredMoments
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.decoder import Decoder
from svsk_jax.model.parameters import HEAD_INPUT, LINEAR_INPUTS, QUANTIZED_LINEARS, layer_shapes
from svsk_jax.models import open_model
from svsk_jax.pipeline.plan import Plan, fixed_plans
from svsk_jax.quant.half_moment import halved
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import InputMoment, OutputSensitivity, QuantConfig, TileShape, recipe
from svsk_jax.storage import writing

Damage = Callable[[np.random.Generator, bytes], bytes]
CONFIG = dataclasses.replace(TINY, num_layers=1, max_position_embeddings=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """`build` fills a folder; a file of it that matches one of `files` is damaged; `read` takes it."""

    build: Callable[[Path], object]
    files: tuple[str, ...]
    damage: Damage
    read: Callable[[Path], object]


def _read_model(path: Path) -> None:
    """Every value, as loading does it; a program is traced where the configuration is another one."""
    source = open_model(str(path))
    parameters = dict(source.outer(np.float32))
    for index in range(source.config.num_layers):
        layer = source.layer(index, np.float32)
        parameters |= {f"layers.{index}.{name}": value for name, value in layer.items()}
    source.fingerprint()
    json.dumps([source.hf_config, source.generation_config, source.config.to_dict()])
    if source.config != CONFIG:
        decoder = Decoder(source.config, jax.tree.map(jnp.asarray, parameters))
        jax.eval_shape(lambda ids: decoder(ids), jax.ShapeDtypeStruct((1, 3), jnp.int32))


def _read_tokenizer(path: Path) -> None:
    tokenizer = open_model(str(path)).tokenizer()
    tokenizer.decode(tokenizer("Some text.\n", add_special_tokens=False)["input_ids"])


def _write_checkpoint(folder: Path) -> None:
    write_checkpoint(folder, 0, CONFIG)


def _write_sharded(folder: Path) -> None:
    write_checkpoint(folder, 0, CONFIG)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shards = dict.fromkeys((name.hf for name in source_names(CONFIG, "hf").values()), "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _write_torch(folder: Path) -> None:
    import torch

    write_checkpoint(folder, 0, CONFIG)
    (folder / "model.safetensors").unlink()
    names = source_names(CONFIG, "hf")
    state = {
        names[path].hf: torch.from_numpy(value.copy())
        for path, value in MemorySource(CONFIG).parameters.items()
    }
    torch.save(state, folder / "pytorch_model.bin")


def _damaged_torch(rng: np.random.Generator, data: bytes) -> bytes:
    """Mostly in the pickle, which comes first in the archive."""
    return damaged_bytes(rng, data, within=2600 if rng.random() < 0.8 else None)


@functools.cache
def _gguf_parts() -> tuple[dict[str, Any], bytes]:
    vocabulary = list(byte_tokenizer().get_vocab())
    vocabulary[90:92] = ["th", "he"]
    names = source_names(CONFIG, "gguf")
    tensors = {names[path].gguf: value for path, value in MemorySource(CONFIG).parameters.items()}
    entries, body = laid_out(tensors | {"rope_freqs.weight": np.linspace(1, 8, CONFIG.head_dim // 2)})
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": CONFIG.num_layers,
        "llama.context_length": CONFIG.max_position_embeddings,
        "llama.embedding_length": CONFIG.hidden_size,
        "llama.feed_forward_length": CONFIG.intermediate_size,
        "llama.attention.head_count": CONFIG.num_heads,
        "llama.attention.head_count_kv": CONFIG.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.type": "none",
        "llama.rope.scale_linear": 1.0,
        "split.count": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.scores": [float(-index) for index in range(97)],
        "tokenizer.ggml.token_type": [1] * 95 + [4, 3],
        "tokenizer.ggml.merges": ["t h", "h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 96,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return {"metadata": metadata, "entries": entries}, body


def _write_gguf(folder: Path) -> None:
    parts, body = _gguf_parts()
    (folder / "model.gguf").write_bytes(encode_gguf(parts["metadata"], parts["entries"], body))


def _damaged_gguf(rng: np.random.Generator, data: bytes) -> bytes:
    """Values and types of the metadata and of the tensors' entries, or bytes of the header."""
    parts, body = _gguf_parts()
    if rng.random() < 0.7:
        which = "metadata" if rng.random() < 0.7 else "entries"
        try:
            changed = {**parts, which: damaged_json(rng, parts[which])}
            if which == "metadata" and rng.random() < 0.3:
                changed["metadata"]["tokenizer.ggml.model"] = "llama"
            return encode_gguf(changed["metadata"], changed["entries"], body)
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError, struct.error):
            pass  # no file can say that
    return damaged_bytes(rng, data, within=len(data) - len(body))


def _read_gguf(folder: Path) -> None:
    _read_model(folder / "model.gguf")
    _read_tokenizer(folder / "model.gguf")


def _write_saved(folder: Path) -> None:
    source = MemorySource(CONFIG)
    config = QuantConfig(rank=3, tile=TileShape(rows=16, columns=32))

    def packed(value: np.ndarray) -> Any:
        if value.ndim == 1:
            return jnp.asarray(value)
        moment = InputMoment(total=jnp.ones(value.shape[1]), tokens=jnp.int32(1))
        return quantize_linear(jnp.asarray(value), moment, config)

    with writing(folder / "saved", overwrite=False) as writer:
        layer = {path: packed(value) for path, value in source.layer(0, np.float32).items()}
        writer.layer(0, layer, dict.fromkeys(QUANTIZED_LINEARS, 0.5))
        outer = source.outer(np.float32)
        outer = {
            "embedding.weight": quantize_int8(jnp.asarray(outer["embedding.weight"])),
            "final_norm.scale": jnp.asarray(outer["final_norm.scale"]),
        }
        writer.outer(outer, source, {"recipe": "test"})


def _damaged_saved(rng: np.random.Generator, data: bytes) -> bytes:
    return damaged_json_bytes(rng, data) if data[:1] == b"{" else damaged_bytes(rng, data)


def _write_statistics(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = layer_shapes(CONFIG, 0)

    def moments() -> StoredMoments:
        widths = {LINEAR_INPUTS[name]: shapes[f"{name}.weight"][1] for name in LINEAR_INPUTS}
        samples = {name: rng.standard_normal((4, width), np.float32) for name, width in widths.items()}
        return {
            name: halved(InputMoment(total=jnp.asarray(x.T @ x), tokens=jnp.int32(4)))
            for name, x in samples.items()
        }

    def sensitivity(name: str) -> OutputSensitivity:
        height = shapes[f"{name}.weight"][0]
        return OutputSensitivity(blocks=jnp.eye(height)[None], weights=jnp.ones((1, 4)), tokens=jnp.int32(4))

    store.write_tokens(folder, np.arange(4)[None])
    store.write_moments(folder, 0, moments())
    store.write_head(folder, {HEAD_INPUT: moments()["attention.input"]})
    store.write_sensitivities(folder, 0, {name: sensitivity(name) for name in LINEAR_INPUTS}, moments())
    text = {"calib": {"builtin": 1}, "chunks": 1, "chunk_length": 4, "moments": "full", "fisher_chunks": 1}
    store.finish(
        folder, {"model": "m", "fingerprint": "f", "text": text | {"seed": 0}, "seconds": {"load": 1.0}}
    )


def _damaged_statistics(rng: np.random.Generator, data: bytes) -> bytes:
    return damaged_json_bytes(rng, data) if data[:1] == b"{" else damaged_safetensors(rng, data)


def _read_statistics(folder: Path) -> None:
    statistics = Statistics.open(folder)
    statistics.check_model("f", "m")
    statistics.check_layers(CONFIG)
    statistics.tokens()
    for moments in (statistics.layer(0), statistics.sensitivities(0)[1]):
        assert all(np.isfinite(np.asarray(moment.mean)).all() for moment in moments.values())


def _write_recipe(folder: Path) -> None:
    config = recipe("svsk-r16")
    plan = Plan(recipe="tuned", config=config, tensors=fixed_plans(CONFIG, config))
    plan.save(folder / "recipe.json", {"tuning": {"chosen": {"group": {"16": 7}}}})


def _read_recipe(folder: Path) -> None:
    plan = Plan.load(folder / "recipe.json")
    plan.check_model(CONFIG)


TARGETS = {
    "safetensors": Target(
        build=_write_checkpoint, files=("model.safetensors",), damage=damaged_safetensors, read=_read_model
    ),
    "index": Target(
        build=_write_sharded,
        files=("model.safetensors.index.json",),
        damage=damaged_json_bytes,
        read=_read_model,
    ),
    "config": Target(
        build=_write_checkpoint, files=("config.json",), damage=damaged_json_bytes, read=_read_model
    ),
    "tokenizer": Target(
        build=_write_checkpoint,
        files=("tokenizer.json", "tokenizer_config.json"),
        damage=damaged_json_bytes,
        read=_read_tokenizer,
    ),
    "gguf": Target(build=_write_gguf, files=("model.gguf",), damage=_damaged_gguf, read=_read_gguf),
    "torch": Target(
        build=_write_torch, files=("pytorch_model.bin",), damage=_damaged_torch, read=_read_model
    ),
    "saved": Target(
        build=_write_saved,
        files=("saved/svsk/*/_*METADATA", "saved/svsk/*/_*METADATA", "saved/svsk/*/**/*", "saved/*.json"),
        damage=_damaged_saved,
        read=lambda folder: _read_model(folder / "saved"),
    ),
    "statistics": Target(
        build=_write_statistics,
        files=("calibration.json", "layer-*", "fisher-*", "tokens*"),
        damage=_damaged_statistics,
        read=_read_statistics,
    ),
    "recipe": Target(
        build=_write_recipe, files=("recipe.json",), damage=damaged_json_bytes, read=_read_recipe
    ),
}
"""By kind of input."""
