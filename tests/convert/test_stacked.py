"""Experts as separate tensors and as stacks, in safetensors and GGUF; and written for transformers."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from support import TINY, MemorySource
from support_convert import hf_tensors, parameters_of, write_gguf, write_safetensors

from convert import open_checkpoint
from convert.names import source_names
from svsk_jax.model import Mixture
from svsk_jax.storage.export import export_dense

MIXTURE = Mixture(
    num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=1
)
CONFIG = dataclasses.replace(
    TINY,
    architecture="qwen3_moe",
    qk_norm=True,
    hidden_size=64,
    num_heads=8,
    intermediate_size=96,
    num_layers=2,
    mixture=MIXTURE,
)
PREFIX = "model.layers.{}.mlp.experts"


def stacked_tensors(config):
    """As transformers from version 5 holds them."""
    tensors = hf_tensors(config)
    for index in range(config.num_layers):
        prefix = PREFIX.format(index)
        gate, up, down = (
            [tensors.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(3)]
            for name in ("gate", "up", "down")
        )
        both = [np.concatenate(pair) for pair in zip(gate, up, strict=True)]
        tensors[f"{prefix}.gate_up_proj"] = np.stack(both)
        tensors[f"{prefix}.down_proj"] = np.stack(down)
    return tensors


def check(source, expected):
    assert source.config.mixture == MIXTURE
    for index in range(2):
        for path, value in source.layer(index, np.float32).items():
            np.testing.assert_array_equal(value, expected[f"layers.{index}.{path}"], err_msg=path)


@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_safetensors(tmp_path, form):
    write_safetensors(tmp_path, CONFIG, stacked_tensors(CONFIG) if form == "stacked" else None)
    source = open_checkpoint(str(tmp_path))
    assert source.config == CONFIG
    check(source, parameters_of(CONFIG))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf(tmp_path, kind):
    expected = write_gguf(tmp_path / "m.gguf", CONFIG, gguf.GGMLQuantizationType[kind])
    check(open_checkpoint(str(tmp_path / "m.gguf")), expected)


def test_stacks_that_do_not_fit_are_named(tmp_path):
    tensors = stacked_tensors(CONFIG)
    name = f"{PREFIX.format(1)}.down_proj"
    tensors[name] = tensors[name][:2]
    write_safetensors(tmp_path, CONFIG, tensors)
    with pytest.raises(ValueError, match=r"(?s)missing \(3\): .*unknown \(1\): .*1\.mlp\.experts\.down_proj"):
        open_checkpoint(str(tmp_path))
    tensors[name] = np.zeros((3, 64, 31), np.float32)
    write_safetensors(tmp_path, CONFIG, tensors)
    with pytest.raises(
        ValueError, match=r"(?s)wrong shape \(3\): .*2\.down_proj\.weight \[64, 31\], expected"
    ):
        open_checkpoint(str(tmp_path))


def test_export_has_the_names_that_transformers_reads(tmp_path):
    source = MemorySource(CONFIG)
    names = {path: name.hf for path, name in source_names(CONFIG, "hf").items()}
    export_dense(source, tmp_path / "out", names, dtype=jnp.float32)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, framework="numpy") as tensors:
        assert set(tensors.keys()) == set(hf_tensors(CONFIG))
    check(open_checkpoint(str(tmp_path / "out")), source.parameters)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, found = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(found.values())
    down = model.model.layers[1].mlp.experts.down_proj.detach().numpy()
    np.testing.assert_array_equal(down[2], source.parameters["layers.1.mlp.experts.2.down.weight"])
