"""The Triton kernels in interpret mode against float64, and the layout that they read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from weights import FORMS, TOLERANCE, error, exact, normal, random_weight

from pallas_kernels.svsk_matmul import dequantize, lay_out, svsk_matmul
from pallas_kernels.svsk_matmul.figures import abstract_weight
from pallas_kernels.svsk_matmul.triton import matmul
from pallas_kernels.svsk_matmul.triton_decode import partial_products
from pallas_kernels.svsk_matmul.triton_prepare import prepare
from pallas_kernels.svsk_matmul.triton_reference import restore
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT, Blocks, heuristic


@pytest.mark.parametrize(
    ("form", "m"),
    [
        # Every form by the kernel for one row and by the one for several, in bf16 and in f16.
        *((form, m) for i, form in enumerate(FORMS) for m in (1, (7, 64)[i % 2])),
        ("companded g16", 2),
        ("linear g16, ranks that differ", 16),
        ("companded g32, rank 16", 128),
    ],
)
def test_against_float64(form, m):
    rng = np.random.default_rng(m)
    weight = random_weight(rng, 200, 330, **FORMS[form])
    dtype = (jnp.float16, jnp.bfloat16)[m % 2]
    x = normal(rng, m, 330, dtype=dtype)
    y = svsk_matmul(x, lay_out(weight), "triton_interpret")
    assert (y.shape, y.dtype) == ((m, 200), x.dtype)
    assert error(y, exact(x, weight)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize(
    ("rows", "tile", "paired"),
    [
        ((256, 128), 128, True),
        ((256, 100), 256, True),
        ((256, 128), 64, False),
        ((256, 128), 192, False),
        ((64, 128), 128, False),
    ],
)
def test_rows_of_v_that_pairs_of_blocks_share(rows, tile, paired):
    rng = np.random.default_rng(0)
    found = lay_out([random_weight(rng, n, 64, ranks=2, tile=(tile, 0)) for n in rows])
    assert found.paired == paired
    pairs = found.ranges[: len(found.ranges) // 2 * 2, :2].reshape(-1, 2, 2)
    assert bool((pairs[:, 0] == pairs[:, 1]).all()) == paired


@pytest.mark.parametrize(
    ("rows", "tile", "units"),
    [
        ((512, 256, 256), 128, 2),
        ((512, 512), 0, 8),
        ((512, 256, 256), 0, 0),
        ((512, 64, 64), 128, 0),
        ((320,), 128, 2),
        ((200, 100), 100, 0),
    ],
)
def test_places_that_tiles_tell(rows, tile, units):
    rng = np.random.default_rng(0)
    found = lay_out([random_weight(rng, n, 64, ranks=(3, 17), tile=(tile, 0)) for n in rows])
    assert found.tile_units == units
    first, count, place = found.ranges.T
    places, alive = found.places[:-1], found.places[-1]
    assert alive == jnp.max(first + count)
    assert jnp.array_equal(place, jnp.arange(len(place)) // units * found.sidecar_ranks if units else first)
    assert jnp.array_equal(places[first], place)
    # A program stores the padding's numbers too.
    assert len(set(places.tolist())) == len(places)
    assert jnp.min(places) >= 0
    assert jnp.max(places) < found.product_columns - found.padded_rows
    assert jnp.max(place + count) <= found.product_columns - found.padded_rows


@pytest.mark.parametrize(
    ("shape", "m"),
    # Each by one of the two kernels, the least by both.
    [((64, 256), 1), ((192, 576), 3), ((1, 1), 1), ((1, 1), 3), ((577, 31), 3), ((70, 1100), 1)],
)
def test_ragged_shapes(shape, m):
    rng = np.random.default_rng(0)
    weight = random_weight(rng, *shape, ranks=3)
    x = normal(rng, m, shape[1], dtype=jnp.bfloat16)
    assert error(svsk_matmul(x, lay_out(weight), "triton_interpret"), exact(x, weight)) < 4e-3


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 600),
    m=st.integers(1, 20),
    group=st.sampled_from([16, 32]),
    rank=st.integers(0, 20),
    tile=st.tuples(st.integers(1, 300), st.integers(0, 700)),
    companded=st.booleans(),
)
def test_any_shape(n, k, m, group, rank, tile, companded):
    rng = np.random.default_rng(n * k)
    weight = random_weight(
        rng, n, k, group=group, ranks=(0, rank), tile=tile, coefficients=(0.008, 0.3) if companded else None
    )
    x = normal(rng, m, k)
    expected = exact(x, weight)
    y = np.asarray(svsk_matmul(x, lay_out(weight), "triton_interpret"), np.float64)
    # Of single outputs, hence against what they sum.
    size = np.linalg.norm(np.asarray(x, np.float64)) * np.linalg.norm(np.asarray(dequantize(weight)))
    assert np.linalg.norm(y - expected) <= 1.5e-3 * max(np.linalg.norm(expected), size / np.sqrt(k))


@pytest.mark.parametrize("form", FORMS)
def test_the_layout_holds_the_same_weight(form):
    weight = random_weight(np.random.default_rng(1), 200, 330, **FORMS[form])
    np.testing.assert_allclose(restore(lay_out(weight)), dequantize(weight), rtol=2e-5, atol=2e-6)


def test_bytes_of_the_layout():
    weight = random_weight(np.random.default_rng(1), 512, 1024, ranks=16)
    # Scales take a byte instead of six bits, ranges and codebook of each 64 rows 28 bytes; V has 64 rows
    # instead of 16, with f32 scales and places (one more of these, the codebook one number less).
    assert lay_out(weight).nbytes == weight.nbytes + 512 * 64 // 4 + 8 * 28 + 48 * 1024 + 128 * 8 - 16 * 2


def test_layers_whose_ranks_differ_have_the_same_shapes():
    rng = np.random.default_rng(12)
    weights = [random_weight(rng, 512, 256, tile=(128, 0), ranks=(2, 12)) for _ in range(4)]
    assert len({weight.sidecar.ranks for weight in weights}) == 4
    assert len({str(jax.eval_shape(lay_out, weight)) for weight in weights}) <= 2


def test_concrete_and_traced_layouts_are_equal():
    weights = [
        random_weight(np.random.default_rng(13), n, 330, tile=(100, 90), ranks=(0, 5)) for n in (130, 70)
    ]
    jax.tree.map(np.testing.assert_array_equal, lay_out(weights), jax.jit(lay_out)(weights))


@pytest.mark.parametrize(("rows", "warps", "m"), [(64, 2, 16), (128, 4, 64)])
def test_strips_of_a_program_are_programs_of_fewer_rows(rows, warps, m):
    rng = np.random.default_rng(5)
    weight = random_weight(rng, 256, 512, ranks=(3, 20), tile=(128, 0))
    x = normal(rng, m, 512)
    run = partial(matmul, x, lay_out(weight), interpret=True)
    two, one = (
        run(blocks=Blocks(rows=height, superblocks=1, warps=warps, batch=m)) for height in (rows, rows // 2)
    )
    assert error(two, exact(x, weight)) < TOLERANCE[x.dtype]
    np.testing.assert_array_equal(two, one)


@pytest.mark.parametrize("m", [1, 40])
def test_several_weights_in_one_launch(m):
    rng = np.random.default_rng(2)
    weights = [
        random_weight(rng, 100, 300, ranks=4),
        random_weight(rng, 30, 300, group=32, coefficients=(0.01, 0.1)),
        random_weight(rng, 64, 300, group=32, coefficients=None, ranks=(0, 9), tile=(32, 0)),
    ]
    x = normal(rng, m, 300)
    y = svsk_matmul(x, lay_out(weights), "triton_interpret")
    assert error(y, exact(x, *weights)) < 1e-3
    assert error(svsk_matmul(x, lay_out(weights), "reference"), exact(x, *weights)) < 1e-3


@pytest.mark.parametrize("m", [1, 4])
def test_a_layer_of_a_stack(m):
    rng = np.random.default_rng(3)
    layers = [random_weight(rng, 70, 300, ranks=3) for _ in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(lay_out, layers))
    x = normal(rng, m, 300)

    def step(carry, layer):
        return carry, svsk_matmul(x, stack, "triton_interpret", layer=layer)

    _, ys = jax.jit(lambda: jax.lax.scan(step, 0, jnp.arange(3)))()
    for y, weight in zip(ys, layers, strict=True):
        assert error(y, exact(x, weight)) < 1e-3


def test_vmap_and_leading_axes():
    rng = np.random.default_rng(4)
    weight = random_weight(rng, 70, 300, ranks=3)
    x = normal(rng, 2, 3, 300)
    call = partial(svsk_matmul, weight=lay_out(weight), implementation="triton_interpret")
    expected = exact(x, weight)
    assert error(call(x), expected) < 1e-3
    assert error(jax.vmap(call)(x), expected) < 1e-3
    assert error(jax.vmap(jax.vmap(call))(x), expected) < 1e-3


def test_shard_map_over_rows_of_x():
    rng = np.random.default_rng(5)
    weight = random_weight(rng, 70, 300, ranks=3)
    x = normal(rng, 8, 300)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    call = jax.shard_map(
        partial(svsk_matmul, implementation="triton_interpret"),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    assert error(jax.jit(call)(x, lay_out(weight)), exact(x, weight)) < 1e-3


def two_and_their_stack():
    rng = np.random.default_rng(14)
    weights = [lay_out(random_weight(rng, 100, 600, ranks=2)) for _ in range(2)]
    return weights, jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_has_a_grid_of_two_axes(rows):
    # Of three Pallas takes the first as a remainder: 2 µs a layer (benchmarks/speed/NOTES.md).
    weights, stack = two_and_their_stack()
    x, blocks = prepare(jnp.zeros((1, 600)), batch=1, interpret=True), heuristic(weights[0], 1)
    layer = jnp.zeros(rows, jnp.int32)
    traced = jax.make_jaxpr(partial(partial_products, x, stack, blocks))(layer=layer)
    [grid] = [eqn.params["grid_mapping"].grid for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
    parts = stack.superblocks // blocks.superblocks
    assert grid == ((stack.padded_rows + stack.v.shape[-2]) // blocks.rows, parts * rows)


def test_rows_with_matrices_of_their_own():
    weights, stack = two_and_their_stack()
    # Each of three parts of K is another program.
    blocks = Blocks(rows=32, superblocks=1, warps=2)
    x = prepare(normal(np.random.default_rng(15), 1, 600), batch=1, interpret=True)
    layer, order = jnp.asarray([1, 0, 1]), jnp.asarray([2, 0, 1])
    found = partial_products(x, stack, blocks, layer=layer, order=order, interpret=True)
    for row, each in enumerate(layer.tolist()):
        alone = partial_products(x, weights[each], blocks, interpret=True)
        assert alone.shape[0] == 3
        np.testing.assert_array_equal(found[:, row], alone[:, 0])


def test_abstract_values():
    weight = random_weight(np.random.default_rng(6), 70, 300, ranks=3)
    laid = jax.eval_shape(lay_out, weight)
    x = jax.ShapeDtypeStruct((2, 5, 300), jnp.bfloat16)
    for name in ("reference", "triton_interpret"):
        y = jax.eval_shape(partial(svsk_matmul, implementation=name), x, laid)
        assert (y.shape, y.dtype) == ((2, 5, 70), jnp.bfloat16)


@pytest.mark.parametrize("magnitude", [1e-20, 1e5, 1e30])
def test_bf16_of_any_magnitude(magnitude):
    rng = np.random.default_rng(7)
    weight = random_weight(rng, 70, 300, ranks=3)
    x = jnp.asarray(rng.standard_normal((4, 300)) * magnitude, jnp.bfloat16).at[2].set(0)
    y = svsk_matmul(x, lay_out(weight), "triton_interpret")
    assert error(y, exact(x, weight)) < 4e-3
    assert not np.asarray(y[2]).any()


@pytest.mark.parametrize("form", FORMS)
def test_many_rows_restore_the_weight_first(form):
    rng = np.random.default_rng(8)
    weight = random_weight(rng, 200, 330, **FORMS[form])
    dtype = jnp.bfloat16 if form.startswith("linear") else jnp.float16
    x = normal(rng, FUSED_LIMIT, 330, dtype=dtype)
    call = partial(svsk_matmul, implementation="triton_interpret")
    assert "name=svsk_restore" in str(jax.make_jaxpr(call)(x, lay_out(weight)))
    assert "name=svsk_restore" not in str(jax.make_jaxpr(call)(x[:1], lay_out(weight)))
    assert error(call(x, lay_out(weight)), exact(x, weight)) < TOLERANCE[x.dtype]


def test_many_rows_restore_a_layer_of_a_stack():
    rng = np.random.default_rng(11)
    layers = [random_weight(rng, 70, 300, ranks=3) for _ in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(lay_out, layers))
    x = normal(rng, FUSED_LIMIT, 300)
    y = svsk_matmul(x, stack, "triton_interpret", layer=jnp.int32(1))
    assert error(y, exact(x, layers[1])) < 1e-3


def test_a_stored_weight_is_laid_out_on_the_way():
    rng = np.random.default_rng(9)
    weight = random_weight(rng, 70, 300, ranks=3)
    x = normal(rng, 2, 300)
    assert error(svsk_matmul(x, weight, "triton_interpret"), exact(x, weight)) < 1e-3


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 300])
@pytest.mark.parametrize("shape", [(64, 256), (576, 1536), (24576, 4096), (2560, 9728), (960, 576)])
def test_the_heuristic_fits_every_shape(shape, m):
    laid = abstract_weight(*shape, rank=0)
    blocks = heuristic(laid, m)
    blocks.check(laid, -(-m // blocks.batch) * blocks.batch)


def test_no_rows():
    weight = random_weight(np.random.default_rng(0), 70, 300)
    assert svsk_matmul(jnp.zeros((0, 300), jnp.float16), lay_out(weight), "triton_interpret").shape == (0, 70)


def test_refusals():
    rng = np.random.default_rng(10)
    weight = lay_out(random_weight(rng, 70, 300))
    x = normal(rng, 2, 300)
    with pytest.raises(ValueError, match=r"x has 299 columns, the weight \[70, 300\] wants 300"):
        svsk_matmul(x[:, 1:], weight)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; known are reference, blockwise"):
        svsk_matmul(x, weight, "cuda")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, this is cpu"):
        svsk_matmul(x, weight, "triton")
    with pytest.raises(NotImplementedError, match="bf16 or f16, got float32"):
        svsk_matmul(x.astype(jnp.float32), weight, "triton_interpret")
    with pytest.raises(ValueError, match=r"superblocks = 3 does not divide 2, rows = 96 does not divide 128"):
        matmul(x, weight, blocks=Blocks(rows=96, superblocks=3, warps=2, batch=2))
    tall = lay_out(random_weight(rng, 256, 300, ranks=2))
    with pytest.raises(ValueError, match=r"rows = 256 is more than 128 with a sidecar"):
        matmul(x, tall, blocks=Blocks(rows=256, superblocks=1, warps=4, batch=2))
    with pytest.raises(ValueError, match=r"batch = 1 is for one row of x, not 2"):
        matmul(x, weight, blocks=Blocks(rows=64, superblocks=1, warps=2), interpret=True)
    other = random_weight(rng, 70, 301)
    with pytest.raises(ValueError, match=r"need the same K .* \[\[70, 300\], \[70, 301\]\]"):
        lay_out([random_weight(rng, 70, 300), other])
