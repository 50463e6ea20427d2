"""A decoder over a mesh says what the decoder says, and generates the same texts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from peer_memory import Memory, boxes_of, emulate
from support import TINY, MemorySource, byte_tokenizer
from weights import random_int8, random_weight

from svsk_jax.model import Decoder, KVCache, Mixture
from svsk_jax.model import fused_step as fused_module
from svsk_jax.model.fused_step import exchanges, fused_step, likeliest_of
from svsk_jax.model.laid_out import lay_out_parameters
from svsk_jax.model.parameters import QUANTIZED_LINEARS, layer_parameters, random_parameters
from svsk_jax.models import load_model
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.boxes import SPECS, PeerBoxes
from svsk_jax.parallel.decoder import load_parallel, on_mesh
from svsk_jax.runtime import TextGenerator, generate_batch, steps
from svsk_jax.runtime import generate as generate_module
from svsk_jax.runtime.on_mesh import divided, step_on_mesh
from svsk_jax.runtime.sampling import SamplingConfig

PACKED = dataclasses.replace(
    TINY, num_layers=1, hidden_size=128, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=64
)
run = jax.jit(lambda model, tokens: model(tokens))
PROMPTS = ([5, 80, 33, 7], [12], [60, 3, 3])


class PackedSource(MemorySource):
    """Random packed parameters of a configuration."""

    def __init__(self, config, embedding=None, **form):
        super().__init__(config)
        rng = np.random.default_rng(0)
        parameters = dict(random_parameters(config, 0))
        for path, value in parameters.items():
            if any(path.endswith(f"{name}.weight") for name in QUANTIZED_LINEARS):
                parameters[path] = random_weight(rng, *value.shape, **form)
            elif len(value.shape) == 2:
                parameters[path] = (
                    random_int8(rng, *value.shape)
                    if embedding is None
                    else random_weight(rng, *value.shape, **embedding)
                )
        self.parameters = parameters

    def outer(self, dtype):
        return {path: value for path, value in self.parameters.items() if not path.startswith("layers.")}

    def layer(self, index, dtype):
        return layer_parameters(self.parameters, index)


def laid_out(parameters, dtype=None):
    return lay_out_parameters(dict(parameters))


def relative(actual, expected):
    return jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)


def tokens_of(config, batch=4):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, 12)), jnp.int32)


@pytest.mark.parametrize(
    ("data", "model", "changes"),
    [
        (4, 2, {}),
        (1, 4, {"num_heads": 8, "num_kv_heads": 4, "qk_norm": True, "tie_word_embeddings": False}),
        (2, 2, {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "sliding_window": 3}),
    ],
)
def test_dense(data, model, changes):
    config = dataclasses.replace(TINY, **changes)
    source = MemorySource(config)
    alone = Decoder(config, {path: jnp.asarray(value) for path, value in source.parameters.items()})
    spread = load_model(source, mesh=make_mesh(data, model))
    tokens = tokens_of(config)
    assert relative(run(spread, tokens), run(alone, tokens)) < 1e-5


def test_experts_are_whole_on_every_device():
    mixture = Mixture(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config = dataclasses.replace(TINY, architecture="qwen3_moe", qk_norm=True, num_layers=1, mixture=mixture)
    source = MemorySource(config)
    alone = Decoder(config, {path: jnp.asarray(value) for path, value in source.parameters.items()})
    as_they_are = load_parallel(source, jnp.float32, make_mesh(1, 2), lay_out=lambda share, dtype: share)
    tokens = tokens_of(config, batch=2)
    assert relative(run(as_they_are, tokens), run(alone, tokens)) < 1e-5


@pytest.mark.parametrize(
    "form",
    [
        {"ranks": (0, 9), "tile": (128, 0)},
        {"flat": True, "group": 64, "coefficients": None, "ranks": 4, "tile": (128, 96)},
        {"embedding": {"group": 16}},
    ],
    ids=["whole rows", "column tiles", "embedding in 4 bits"],
)
def test_packed_parts_hold_what_the_whole_does(form):
    source = PackedSource(PACKED, **form)
    alone = Decoder(PACKED, source.parameters)
    spread = load_model(source, mesh=make_mesh(2, 2))
    tokens = tokens_of(PACKED)
    assert relative(run(spread, tokens), run(alone, tokens)) < 1e-5
    held = spread.shares.layers[0].mlp.down.weight.get_value()
    assert held.shape == (128, 256)
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 1 for leaf in jax.tree.leaves(held))


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"model=4: attention.k.weight: 2 key heads .* is 2"):
        load_model(MemorySource(TINY), mesh=make_mesh(2, 4))
    narrow = dataclasses.replace(PACKED, intermediate_size=512, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"model=4: layers.0.attention.o.weight: 128 of 512 .* is 2"):
        load_model(PackedSource(narrow), mesh=make_mesh(2, 4))


class EmulatedBoxes(PeerBoxes):
    """In an emulated memory."""

    def __init__(self, mesh):
        self.turn, self.rehearsals, self.patience = 1, 0, 1 << 24
        self.sent = []

    def send(self, call, exchanges, *, wait=True):
        tokens, state = super().send(call, exchanges, wait=wait)
        self.sent.append(tokens)
        return tokens, state

    def take(self, exchanges, *, wait=True):
        turn, self.turn = self.turn, self.turn + exchanges
        self.rehearsals += not wait
        return boxes_of(2, turn, self.patience if wait else 0, groups=2)


@pytest.fixture(scope="module")
def generators():
    """Of a packed model alone, over a mesh, and over one whose devices add up through boxes, by the fused
    step in interpret mode."""
    config = dataclasses.replace(PACKED, hidden_size=64)
    source = PackedSource(config, ranks=(0, 3), tile=(64, 0))
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, Memory(4))
        patch.setattr(generate_module, "why_not_fused", lambda model: None)
        patch.setattr(steps, "fused_steps", partial(steps.fused_steps, interpret=True))
        alone = Decoder(config, laid_out(source.parameters))
        spread = load_parallel(source, jnp.float32, make_mesh(2, 2), lay_out=laid_out)
        made = [TextGenerator(model, byte_tokenizer(), capacity=40) for model in (alone, spread)]
        patch.setattr(generate_module, "why_no_boxes", lambda mesh: None)
        patch.setattr(generate_module, "PeerBoxes", EmulatedBoxes)
        exchanging = TextGenerator(spread, byte_tokenizer(), capacity=40)
        yield [*made, exchanging]
        # Steps that nobody has waited for call back into Python, which must not have ended.
        jax.block_until_ready(exchanging.boxes.sent)


@pytest.mark.parametrize("small_sum", [0, 1 << 18])
def test_the_fused_step(small_sum, one_token, monkeypatch):
    monkeypatch.setattr(fused_module, "SMALL_SUM", small_sum)
    source, (tokens, cache, lengths), (logits, keys, _) = one_token
    spread = load_parallel(source, jnp.float16, make_mesh(1, 2), lay_out=laid_out)
    heads = P(None, None, "model", None)
    step = on_mesh(
        spread.mesh, partial(fused_step, interpret=True), (P(), heads, heads, P()), (P(), heads, heads)
    )
    found, found_keys, _ = jax.jit(step)(spread.shares, tokens, cache.keys, cache.values, lengths)
    assert relative(found, logits) < 2e-3
    np.testing.assert_allclose(found_keys[0], keys[0], atol=1e-2)


@pytest.mark.parametrize(("greedy", "turns_of_a_step"), [(True, 4), (False, 3)])
def test_a_burst_that_adds_up_through_boxes(greedy, turns_of_a_step, one_token, monkeypatch):
    """Two bursts, as one device makes them."""
    memory = Memory(2)
    emulate(monkeypatch, memory)
    # A compiled call keeps the memory that it was traced with.
    jax.clear_caches()
    source, (tokens, cache, lengths), _ = one_token
    alone = Decoder(PACKED, laid_out(source.parameters), jnp.float16)
    spread = load_parallel(source, jnp.float16, make_mesh(1, 2), lay_out=laid_out)
    turns = steps.BURST * exchanges(spread.shares, 1, greedy=greedy)
    assert turns == steps.BURST * turns_of_a_step
    numbers = SamplingConfig(temperature=0.0 if greedy else 1.0).numbers

    def two(model, *boxes):
        leaves, structure = jax.tree.flatten(model.shares if boxes else model)
        step = partial(steps.fused_steps, structure, greedy=greedy, interpret=True)
        step = jax.jit(step_on_mesh(spread.mesh, step) if boxes else step)
        state, found = steps.State(cache.keys, cache.values, lengths, tokens), []
        state = divided(spread.mesh, state) if boxes else state
        for each in boxes or (None, None):
            more, state = step(leaves, state, jax.random.key(0), numbers, each)
            found += np.asarray(more)[:, 0].tolist()
        return found

    found = two(spread, boxes_of(2, 1), boxes_of(2, 1 + turns))
    assert found == two(alone)
    assert len(set(found)) > 2
    # Every turn was taken, and none beyond.
    assert int(memory.boxes.max() >> np.uint64(32)) == 2 * turns


@pytest.mark.parametrize("by_boxes", [False, True])
def test_no_token_behind_the_vocabulary(by_boxes, monkeypatch):
    """Of 13 tokens the last of four devices holds one, and three rows that mean nothing."""
    emulate(monkeypatch, Memory(4))
    jax.clear_caches()
    mesh = make_mesh(1, 4)
    logits = -1 - np.random.default_rng(0).random((16, 8)).astype(np.float32)
    logits[13:] = 0
    logits[12, 0] = -0.5

    def local(rows, boxes):
        return likeliest_of(rows.T, 13, "model", boxes if by_boxes else None, interpret=True)[None]

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(P("model"), SPECS), out_specs=P("model"), check_vma=False
    )
    found = np.asarray(jax.jit(step)(logits, boxes_of(4, 1)))
    assert (found == logits[:13].argmax(0)).all()
    assert found[0, 0] == 12


def test_a_lost_token_is_lost_on_all_devices(one_token, monkeypatch):
    """Only one of them does not know it."""
    emulate(monkeypatch, Memory(2))
    jax.clear_caches()
    source, (tokens, cache, lengths), _ = one_token
    spread = load_parallel(source, jnp.float16, make_mesh(1, 2), lay_out=laid_out)

    def step(share, tokens, keys, values, lengths, boxes):
        tokens = jnp.where(jax.lax.axis_index("model") == 1, steps.LOST, tokens)
        work = partial(fused_step, greedy=True, boxes=boxes, interpret=True)
        return jax.lax.all_gather(work(share, tokens, keys, values, lengths)[0], "model")

    heads = P(None, None, "model", None)
    run = on_mesh(spread.mesh, step, (P(), heads, heads, P(), SPECS), P())
    found = jax.jit(run)(spread.shares, tokens, cache.keys, cache.values, lengths, boxes_of(2, 1))
    assert (np.asarray(found) == steps.LOST).all()


@pytest.fixture(scope="module")
def one_token():
    """A packed model, the arguments of a step, and what one device makes of them."""
    source = PackedSource(PACKED, ranks=(0, 9), tile=(64, 0))
    alone = Decoder(PACKED, laid_out(source.parameters), jnp.float16)
    cache = KVCache.empty(PACKED, 1, 64, jnp.float16)
    tokens, lengths = jnp.asarray([7], jnp.int32), jnp.zeros(1, jnp.int32)
    found = jax.jit(partial(fused_step, interpret=True))(alone, tokens, cache.keys, cache.values, lengths)
    return source, (tokens, cache, lengths), found


def test_greedy_text_by_the_decoder_as_it_is():
    config = dataclasses.replace(TINY, num_layers=1)
    source = MemorySource(config)
    alone, spread = (
        TextGenerator(load_model(source, mesh=mesh), byte_tokenizer(), capacity=40)
        for mesh in (None, make_mesh(2, 2))
    )
    assert not spread.fused
    expected = alone.generate(PROMPTS[0], max_tokens=20).token_ids
    assert spread.generate(PROMPTS[0], max_tokens=20).token_ids == expected
    assert len(set(expected)) > 2


def test_texts_by_the_fused_step(generators):
    alone, spread, exchanging = generators
    assert (alone.copies, spread.copies) == (1, 2)
    expected = [alone.generate(prompt, max_tokens=12).token_ids for prompt in PROMPTS]
    together = generate_batch(spread, PROMPTS, max_tokens=12)
    assert [each.token_ids for each in together] == expected
    assert len(set(expected[0])) > 2
    assert spread.boxes is None
    # A program for one text and one for several, each of which runs once without waiting.
    found = [exchanging.generate(prompt, max_tokens=12).token_ids for prompt in PROMPTS]
    assert found == expected
    assert exchanging.boxes.rehearsals == 1
    for _ in range(2):
        together = generate_batch(exchanging, PROMPTS, max_tokens=12)
        assert [each.token_ids for each in together] == expected
    assert exchanging.boxes.rehearsals == 2
    # Nobody waits as long as the others need.
    exchanging.boxes.patience = 0
    with pytest.raises(RuntimeError, match="a GPU waited in vain"):
        exchanging.generate(PROMPTS[0], max_tokens=12)
    with pytest.raises(RuntimeError, match="a GPU waited in vain"):
        generate_batch(exchanging, PROMPTS, max_tokens=12)
