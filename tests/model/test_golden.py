"""The decoder against transformers in torch, on small random models of every architecture."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_decoder, load_parameters, open_checkpoint
from svsk_jax.model import Decoder, KVCache

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MIXTURE = {
    "head_dim": 16,
    "moe_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied-bias": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mixture": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True}),
    "mixture-some-dense": (
        "Qwen3Moe",
        MIXTURE | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 5, "tie_word_embeddings": False}),
    "mistral-tied": ("Mistral", {"sliding_window": None, "head_dim": 8, "tie_word_embeddings": True}),
}


def torch_logits(folder: Path, family: str, options: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Save a random model to the folder and return its logits."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit scales, as freshly initialised, would hide a swap.
            parameter.add_(0.2 * torch.randn_like(parameter))
        logits = model(torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(folder)
    return logits


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(tmp_path, case):
    family, options = CASES[case]
    tokens = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 20)).astype(np.int32)
    expected = torch_logits(tmp_path, family, options, tokens)
    decoder = load_decoder(open_checkpoint(str(tmp_path)), jnp.float32)
    full = np.asarray(jax.jit(lambda model, ids: model(ids))(decoder, jnp.asarray(tokens)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(full, expected, atol=1e-4, rtol=1e-4)

    step = jax.jit(lambda model, ids, cache: model.extend(ids, cache))
    cache = KVCache.empty(decoder.config, 2, 32, jnp.float32)
    for position in range(tokens.shape[1]):
        logits, cache = step(decoder, jnp.asarray(tokens[:, position : position + 1]), cache)
        np.testing.assert_allclose(np.asarray(logits), expected[:, position], atol=1e-4, rtol=1e-4)
    cache = KVCache.empty(decoder.config, 2, 32, jnp.float32)
    for start, stop in ((0, 10), (10, 20)):
        logits, cache = step(decoder, jnp.asarray(tokens[:, start:stop]), cache)
        np.testing.assert_allclose(np.asarray(logits), expected[:, stop - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.smollm2
def test_smollm2_reads_english(smollm2_gguf):
    """Nats per token on prose that comes with Python; interleaved query and key rows must ruin it."""
    source = open_checkpoint(str(smollm2_gguf))
    text = "".join(list(pydoc_data.topics.topics.values())[:20])[:6000]
    ids = source.tokenizer()(text)["input_ids"][: 2 * 512]
    tokens = jnp.asarray(ids, jnp.int32).reshape(2, 512)

    run_layer = jax.jit(lambda layer, x, positions: layer(x, positions)[0])

    @jax.jit
    def mean_nll(logits):
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

    def nll(model: Decoder) -> float:
        # Layer by layer, so that thirty equal layers compile once.
        x = model.embedding(tokens, jnp.float32)
        for layer in model.layers:
            x = run_layer(layer, x, jnp.arange(512, dtype=jnp.int32))
        return float(mean_nll(model.logits(x)[:, :-1]))

    parameters = load_parameters(source, jnp.float32)
    good = nll(Decoder(source.config, parameters))
    for path, value in parameters.items():
        if path.endswith(("attention.q.weight", "attention.k.weight")):
            heads, (rows, columns) = source.sources[path].heads, value.shape
            halves = value.reshape(heads, 2, rows // heads // 2, columns)
            parameters[path] = halves.swapaxes(1, 2).reshape(rows, columns)
    bad = nll(Decoder(source.config, parameters))
    assert 2.5 < good < 2.8
    assert bad > good + 1
