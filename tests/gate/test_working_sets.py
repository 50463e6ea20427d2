"""Memory of the programs that have most of it, compiled for a GPU that is not here: `make gate`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import aot
from svsk_jax.calibration.sensitivity import head_gradient
from svsk_jax.known_models import KNOWN
from svsk_jax.model.decoder import Tail
from svsk_jax.model.parameters import outer_shapes
from svsk_jax.parallel import sharding
from svsk_jax.pipeline.working_sets import FACTOR_COPIES, Widths
from svsk_jax.quant.half_moment import half_size, lower_rows, mirrored
from svsk_jax.quant.joint import _input_metric
from svsk_jax.quant.sidecar_fit import _factor

pytestmark = pytest.mark.skipif(
    bool(aot.what_is_missing()),
    reason=f"NOTHING WAS COMPILED FOR A GPU: {', '.join(aot.what_is_missing())} missing; run `make gate`",
)
MODEL = KNOWN["Qwen3-8B"]
MESH = (("data", 1), ("model", 1))


def taken(function: Any, *arguments: Any) -> int:
    """Bytes beside arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_factoring_a_moment_takes_what_is_planned():
    width = MODEL.intermediate_size
    with aot.targeting("sm_90") as mesh:
        H = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        # Of its two results one is the moment itself, put in order.
        planned = 4 * width**2 * FACTOR_COPIES["gpu"]
        assert 0.9 * planned < taken(_input_metric, H, 0.05, 0.01) < 1.05 * planned
        assert taken(_factor, H) < 1.05 * planned


def test_halves_are_made_and_mirrored_in_place():
    width = MODEL.intermediate_size
    with aot.targeting("sm_90") as mesh:

        def abstract(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

        assert taken(lower_rows, abstract(width, width)) == 0
        assert taken(lower_rows, abstract(16, 2048, 2048)) == 0
        assert taken(mirrored, abstract(half_size(width))) < 0.05 * 4 * width**2


def test_the_gradient_at_the_head_takes_what_is_planned():
    """Of a chunk in four whole pieces, and of one whose fourth piece is nearly all padding."""
    lengths, vocabulary = (512, 385), MODEL.vocab_size
    with aot.targeting("sm_90", MESH) as mesh:

        def abstract(like: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)

        parameters = {
            path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in outer_shapes(MODEL).items()
        }
        tail = jax.tree.map(
            lambda leaf: abstract(leaf, sharding(mesh)), jax.eval_shape(lambda p: Tail(MODEL, p), parameters)
        )
        mask = jax.ShapeDtypeStruct((4,), jnp.float32)
        chunks = sharding(mesh, "chunks")
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding(mesh))

        def of_chunks(length: int) -> int:
            x = jax.ShapeDtypeStruct((4, length, MODEL.hidden_size), jnp.bfloat16)
            return taken(
                head_gradient, tail, abstract(x, chunks), abstract(mask, chunks), number, number, mesh
            )

        found = np.asarray([of_chunks(length) for length in lengths])
    ratios = found / np.asarray([Widths.head(length, vocabulary) for length in lengths])
    assert (ratios > 0.7).all()
    assert (ratios < 1.05).all()
    np.testing.assert_allclose(ratios, ratios[0], rtol=0.02)
