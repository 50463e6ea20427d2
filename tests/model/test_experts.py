"""The mixture's dispatch and products against the plain sum over experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY
from weights import random_weight

from pallas_kernels.svsk_matmul import SVSKWeight, dequantize, stack
from svsk_jax.config_limits import check_config
from svsk_jax.model import Decoder, Mixture, ModelConfig
from svsk_jax.model.experts import Experts, block_rows, grouped, in_blocks
from svsk_jax.model.fused_step import why_not_fused
from svsk_jax.model.laid_out import lay_out_parameters, transpose_parameters
from svsk_jax.model.parameters import EXPERT_LINEARS, layer_parameters, layer_shapes, random_parameters

MIXTURE = Mixture(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40)
CONFIG = dataclasses.replace(TINY, architecture="qwen3_moe", qk_norm=True, num_layers=1, mixture=MIXTURE)


def parameters():
    return layer_parameters(random_parameters(CONFIG, 0), 0)


def plain(x, parameters, *, norm):
    """Σ p_e down_e(silu(gate_e x) up_e x), token by token, in float64."""
    W = {path: np.asarray(value, np.float64) for path, value in parameters.items()}
    y = np.zeros_like(x)
    for token, row in enumerate(x):
        logits = W["mlp.router.weight"] @ row
        p = np.exp(logits - logits.max())
        p /= p.sum()
        chosen = np.argsort(-p)[:2]
        for e in chosen:
            gate, up = (W[f"mlp.experts.{e}.{name}.weight"] @ row for name in ("gate", "up"))
            hidden = gate / (1 + np.exp(-gate)) * up
            weight = p[e] / p[chosen].sum() if norm else p[e]
            y[token] += weight * (W[f"mlp.experts.{e}.down.weight"] @ hidden)
    return y


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("norm", [False, True])
def test_is_the_sum_over_chosen_experts(tokens, norm):
    mixture = dataclasses.replace(MIXTURE, norm_topk_prob=norm)
    experts = Experts(dataclasses.replace(CONFIG, mixture=mixture), parameters())
    x = np.random.default_rng(0).standard_normal((tokens, 48))
    found = jax.jit(lambda m, x: m(x))(experts, jnp.asarray(x, jnp.float32)[None])[0]
    np.testing.assert_allclose(found, plain(x, parameters(), norm=norm), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("spread", ["even", "one", "skewed"])
def test_blocks_hold_each_pair_once(rows, spread):
    """However unevenly tokens are routed, every pair has a row, in a block of its expert."""
    rng = np.random.default_rng(1)
    chosen = np.stack([rng.permutation(5)[:2] for _ in range(23)])
    if spread == "one":
        chosen[:] = (4, 0)
    elif spread == "skewed":
        chosen[:20] = (2, 3)
    blocks = in_blocks(jnp.asarray(chosen), 5, rows)
    owner, pair = np.asarray(blocks.expert), np.asarray(blocks.pair)
    assert sorted(pair[pair < 46]) == list(range(46))
    for index, of in zip(owner, pair, strict=True):
        assert all(chosen.reshape(-1)[each] == index for each in of[of < 46])
    used = np.any(pair < 46, axis=1)
    assert np.all(owner[~used] == 5)
    assert used.sum() == sum(-(-count // rows) for count in np.bincount(chosen.reshape(-1)))


def test_a_token_alone_reads_only_its_experts():
    mixture = dataclasses.replace(MIXTURE, num_experts=128, num_experts_per_tok=8)
    assert block_rows(1, mixture) == 1
    blocks = in_blocks(jnp.arange(8)[None], 128, 1)
    assert blocks.pair.shape == (8, 1)
    assert [block_rows(t, mixture) for t in (2, 64, 512, 4096)] == [8, 8, 32, 128]


ROWS, WHOLE = (24, 0), (40, 0)


@pytest.mark.parametrize("tiles", ["alike", "different", "none", "flat"])
def test_a_stack_restores_each_weight_exactly(tiles):
    """Groups of 16 and 32, ranks that differ, no sidecar at all, tiles that differ."""
    rng = np.random.default_rng(0)
    flat, some = tiles == "flat", 0 if tiles == "none" else (1, 3)
    weights = [
        random_weight(rng, 40, 90, group=32 if not flat else 16, ranks=some, tile=ROWS, flat=flat),
        random_weight(rng, 40, 90, group=16, flat=flat),
        random_weight(rng, 40, 90, group=16, ranks=some, tile=ROWS, flat=flat),
    ]
    if tiles == "different":
        weights[2] = random_weight(rng, 40, 90, group=16, ranks=(2, 5), tile=(40, 64))
    both = stack(weights)
    for index, weight in enumerate(weights):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], both)
        np.testing.assert_array_equal(one.codes, weight.codes)
        np.testing.assert_allclose(restored(one), restored(weight), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected weights of one shape"):
        stack([weights[0], random_weight(rng, 24, 90, group=32)])


restored = jax.jit(dequantize)


def packed_parameters():
    rng = np.random.default_rng(0)
    packed, shapes = parameters(), layer_shapes(CONFIG, 0)
    for e in range(5):
        for name in EXPERT_LINEARS:
            path = f"mlp.experts.{e}.{name}.weight"
            packed[path] = random_weight(rng, *shapes[path], ranks=3 * e, tile=ROWS)
    return packed


@pytest.mark.parametrize("lay_out", [dict, transpose_parameters, lay_out_parameters])
def test_packed_experts_are_their_dense_restore(lay_out):
    packed = packed_parameters()
    dense = {path: restored(v) if isinstance(v, SVSKWeight) else v for path, v in packed.items()}
    run = jax.jit(lambda m, x: m(x))
    laid_out = Experts(CONFIG, lay_out(packed))
    for tokens in (1, 7):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, 48)), jnp.float32)
        expected = run(Experts(CONFIG, dense), x)
        np.testing.assert_allclose(run(laid_out, x), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_gradient_keeps_no_weights_for_each_block():
    """Of the input's gradient alone; weights of a block are sixteen times its rows here."""
    W = jnp.zeros((4, 128, 128), jnp.float32)
    x, owner = jnp.zeros((64, 8, 128), jnp.float32), jnp.zeros(64, jnp.int32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(grouped(x, W, owner, 128)))))
    analysis = gradient.lower(x).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 * x.nbytes + W.nbytes < 64 * W[0].nbytes


def test_the_fused_step_says_no_to_several_devices():
    decoder = Decoder(CONFIG, random_parameters(CONFIG, 0), axis="model")
    assert why_not_fused(decoder) == "its layers are mixtures of experts, over several devices"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be positive, got 0"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than the 5 experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size must be positive"),
        ({"num_experts": 10**7}, "200,000 experts in all"),
        ({"moe_intermediate_size": 2**31}, "beyond what is taken"),
        ({"mlp_only_layers": (1,)}, "mlp_only_layers names layer 1, the model has layers 0 to 0"),
        ({"mlp_only_layers": (-1,)}, "mlp_only_layers names layer -1"),
    ],
)
def test_hostile_mixtures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_config(
            dataclasses.replace(CONFIG, mixture=dataclasses.replace(MIXTURE, **change)), "config.json"
        )


def test_configurations_survive_their_forms():
    mixture = dataclasses.replace(MIXTURE, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=(3,))
    config = dataclasses.replace(CONFIG, num_layers=6, mixture=mixture)
    assert [config.has_experts(index) for index in range(6)] == [False, True, False, False, False, True]
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_dict(config.to_dict()) == config
    newer = config.to_hf()
    newer["num_local_experts"] = newer.pop("num_experts")
    assert ModelConfig.from_hf(newer) == config
    assert "mixture" not in TINY.to_dict()
    with pytest.raises(ValueError, match="integers under num_experts"):
        ModelConfig.from_hf({key: value for key, value in config.to_hf().items() if key != "num_experts"})
