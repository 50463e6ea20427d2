"""A decode step compiled for an H100 runs the kernels on the weights where they lie."""

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.speed.models import packed_parameters
from pallas_kernels import aot
from pallas_kernels.decode_step import Boxes
from svsk_jax.known_models import KNOWN
from svsk_jax.model import Decoder, KVCache
from svsk_jax.model.fused_step import fused_step
from svsk_jax.model.laid_out import lay_out_parameters
from svsk_jax.parallel import DATA, MODEL, sharding
from svsk_jax.parallel.boxes import SPECS
from svsk_jax.parallel.decoder import on_mesh
from svsk_jax.parallel.parameters import config_of_share

pytestmark = pytest.mark.skipif(
    bool(aot.what_is_missing()),
    reason=f"NO DECODE STEP WAS COMPILED FOR A GPU: {', '.join(aot.what_is_missing())} missing: `make gate`",
)
CONFIG = dataclasses.replace(KNOWN["Qwen3-0.6B"], num_layers=2, vocab_size=4096, tie_word_embeddings=False)
BATCH = 8
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "f16": 2, "bf16": 2, "s32": 4, "f32": 4}


def step(parameters, token, keys, values, length):
    cache = KVCache(keys=keys, values=values, length=length)
    logits, grown = Decoder(CONFIG, parameters, jnp.bfloat16).extend(token, cache)
    return jnp.argmax(logits, axis=-1), grown.keys, grown.values, grown.length


def moved(text):
    """Bytes of each array that a copy, a conversion or a transposition makes."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:copy|convert|transpose)\(", text)
    return [
        BYTES.get(kind, 8) * math.prod(map(int, shape.split(",") if shape else [])) for kind, shape in found
    ]


def abstract_step(lengths, config=CONFIG, embedding="int8", **form):
    weights = jax.eval_shape(
        lambda key: lay_out_parameters(packed_parameters(config, key, embedding=embedding, **form)),
        jax.random.key(0),
    )
    batch = BATCH if lengths is None else lengths.shape[0]
    keys = jax.ShapeDtypeStruct((batch, 16, config.num_kv_heads, config.head_dim), jnp.bfloat16)
    return weights, (keys,) * config.num_layers


MIXTURE = dataclasses.replace(
    KNOWN["Qwen3-30B-A3B"], num_layers=2, vocab_size=4096, tie_word_embeddings=False
)


def check_nothing_large_moves(weights, text):
    smallest = min(leaf.words.size for path, leaf in weights.items() if path.endswith("o.weight"))
    assert max(moved(text), default=0) < smallest


def test_the_decoder_as_it_is():
    weights, cache = abstract_step(None)
    token, length = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    # Attention of bf16 promotes on its own.
    with jax.numpy_dtype_promotion("standard"):
        program = aot.compile_for(step, (weights, token, cache, cache, length), "sm_90")
    names = {re.sub(r"__\d+$", "", kernel.name) for kernel in program.kernels}
    assert {"svsk_rows", "svsk_prepare", "svsk_epilogue", "svsk_int8"} <= names
    # Layers of equal shapes share their kernels: qkv, o, gate and up, down.
    assert sum(kernel.name.startswith("svsk_rows") for kernel in program.kernels) == 4
    text = program.text
    assert len(re.findall(r'name = "svsk_rows"', text)) == 4 * CONFIG.num_layers
    check_nothing_large_moves(weights, text)


def launches(text):
    """How often each kernel is launched."""
    return Counter(re.findall(r'name = "(svsk_\w+)"', text))


def alone(program):
    """The step's kernels outside of command buffers."""
    return [name for name in program.launched_alone if name.startswith("svsk_")]


def of_a_step(batch, embedding="int8"):
    """Launches of the fused step's kernels."""
    product = "svsk_decode" if batch == 1 else "svsk_rows"
    of_a_layer = {product: 4, "svsk_residual": 2} | dict.fromkeys(("svsk_attend", "svsk_gated"), 1)
    expected = {name: count * CONFIG.num_layers for name, count in of_a_layer.items()}
    head = product if embedding == "q4" else "svsk_int8"
    return Counter(expected) + Counter(["svsk_residual", head])


@pytest.mark.parametrize("by_boxes", [False, True], ids=["by XLA", "by boxes"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_fused_step_over_two_devices(batch, by_boxes):
    axes = ((DATA, 1), (MODEL, 2))
    share = config_of_share(CONFIG, 2)
    held = dataclasses.replace(share, vocab_size=CONFIG.vocab_size // 2)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    weights, _ = abstract_step(tokens, held)

    def fused(parameters, tokens, keys, values, lengths, boxes):
        model = Decoder(share, parameters, jnp.bfloat16, axis=MODEL)
        boxes = boxes if by_boxes else None
        return fused_step(model, tokens, keys, values, lengths, greedy=True, boxes=boxes)

    with aot.targeting("sm_90", axes) as mesh:
        divided, heads = sharding(mesh, "heads"), sharding(mesh, "batch", None, "heads", None)
        shares = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype, sharding=divided), weights
        )
        shape = (batch, 16, CONFIG.num_kv_heads, CONFIG.head_dim)
        cache = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=heads),) * CONFIG.num_layers
        step = on_mesh(mesh, fused, (P(), heads.spec, heads.spec, P(), SPECS), (P(), heads.spec, heads.spec))
        boxes = Boxes(
            addresses=jax.ShapeDtypeStruct(
                (1, 2, 5), jnp.int32, sharding=NamedSharding(mesh, SPECS.addresses)
            ),
            turn=jax.ShapeDtypeStruct((1,), jnp.int32),
            patience=jax.ShapeDtypeStruct((1,), jnp.int32),
        )
    program = aot.compile_for(step, (shares, tokens, cache, cache, tokens, boxes), "sm_90", axes)
    text = program.text
    # A sum behind o and down, and one for the embedding; the best of all devices is gathered.
    sums = 2 * CONFIG.num_layers + 1
    assert launches(text) == of_a_step(batch) + Counter({"svsk_likeliest": int(by_boxes)})
    assert len(re.findall(r" = .*? all-reduce-start\(", text)) == (0 if by_boxes else sums)
    assert len(re.findall(r" = .*? all-gather-start\(", text)) == (0 if by_boxes else 1)
    # The parts of one token are summed as they are, by the devices' sum alone.
    assert batch > 1 or "loop_reduce_fusion" not in text
    # XLA launches its own sums from the host, and between them everything else; by boxes nothing is.
    assert bool(program.launched_alone) != by_boxes
    # A thread has one number, which it sends to the other device, or would send to this one.
    sends = [
        sum(each.opcode.startswith("STG") and each.opcode.endswith("SYS") for each in kernel.instructions)
        for kernel in program.kernels
        if "residual" in kernel.name
    ]
    assert max(sends) == (2 if by_boxes else 0)
    check_nothing_large_moves(weights, text)


@pytest.mark.parametrize("rank", [9, 40])
def test_nothing_spills_for_many_texts(rank):
    """They have small programs of attention, or, with more ranks than these hold, large ones."""
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
    config = dataclasses.replace(KNOWN["Qwen3-8B"], num_layers=1, vocab_size=4096)
    weights, cache = abstract_step(tokens, config, rank=rank)

    def fused(parameters, tokens, keys, values, lengths):
        model = Decoder(config, parameters, jnp.bfloat16)
        return fused_step(model, tokens, keys, values, lengths, greedy=True)

    program = aot.compile_for(fused, (weights, tokens, cache, cache, tokens), "sm_90")
    assert {"svsk_attend", "svsk_gated"} <= {kernel.name for kernel in program.kernels}
    assert not {kernel.name: kernel.spilled_bytes for kernel in program.kernels if kernel.spilled_bytes > 32}


@pytest.mark.parametrize("embedding", ["int8", "q4"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_fused_step(batch, embedding):
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    weights, cache = abstract_step(tokens, embedding=embedding)

    def fused(parameters, tokens, keys, values, lengths):
        logits, keys, values = fused_step(
            Decoder(CONFIG, parameters, jnp.bfloat16), tokens, keys, values, lengths
        )
        return jnp.argmax(logits, axis=-1), keys, values

    program = aot.compile_for(fused, (weights, tokens, cache, cache, tokens), "sm_90")
    text = program.text
    assert not alone(program)
    assert launches(text) == of_a_step(batch, embedding)
    # Nothing else is launched for a layer: what remains looks tokens up, turns angles and takes the largest.
    assert len(re.findall(r" = .*? fusion\(", text)) <= 12
    spilled = {kernel.name: kernel.spilled_bytes for kernel in program.kernels if kernel.spilled_bytes > 32}
    assert not spilled
    check_nothing_large_moves(weights, text)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_fused_step_of_a_mixture(batch):
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    weights, cache = abstract_step(tokens, MIXTURE)

    def fused(parameters, tokens, keys, values, lengths):
        return fused_step(
            Decoder(MIXTURE, parameters, jnp.bfloat16), tokens, keys, values, lengths, greedy=True
        )

    program = aot.compile_for(fused, (weights, tokens, cache, cache, tokens), "sm_90")
    text = program.text
    assert not alone(program)
    own = ("svsk_router", "svsk_choice", "svsk_weighed")
    of_experts = Counter(dict.fromkeys(own, MIXTURE.num_layers))
    if batch > 1:
        # Experts' products take a row each, others all rows.
        of_experts += Counter({"svsk_decode": 2 * MIXTURE.num_layers, "svsk_order": MIXTURE.num_layers})
        of_experts.subtract({"svsk_rows": 2 * MIXTURE.num_layers})
    expected = of_a_step(batch)
    expected.update(of_experts)
    assert launches(text) == expected
    # As of a dense model.
    assert len(re.findall(r" = .*? fusion\(", text)) <= 12
    assert not [kernel.name for kernel in program.kernels if kernel.spilled_bytes]
    check_nothing_large_moves(weights, text)
