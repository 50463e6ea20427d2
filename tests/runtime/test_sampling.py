import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_jax.runtime.sampling import SamplingConfig, sample

DRAWS, VOCABULARY = 400, 13
batched = jax.jit(sample)


def logits_of(seed: int) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(VOCABULARY)).astype(np.float32)


def draws(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    repeated = jnp.broadcast_to(jnp.asarray(logits), (DRAWS, logits.size))
    return np.asarray(batched(repeated, jax.random.key(config.seed), config.numbers))


def allowed_by_hugging_face(logits: np.ndarray, config: SamplingConfig) -> set[int]:
    """temperature → top-k → top-p → min-p as transformers' warpers write them, in float64."""

    def softmax(z):
        p = np.exp(z - z.max())
        return p / p.sum()

    z = logits.astype(np.float64) / config.temperature
    if config.top_k:
        z = np.where(z < np.sort(z)[-min(config.top_k, z.size)], -np.inf, z)
    if config.top_p < 1:
        ascending = np.argsort(z)
        remove = np.cumsum(softmax(z)[ascending]) <= 1 - config.top_p
        remove[-1] = False
        z[ascending[remove]] = -np.inf
    if config.min_p:
        p = softmax(z)
        z = np.where(p < config.min_p * p.max(), -np.inf, z)
    return set(np.flatnonzero(np.isfinite(z)).tolist())


seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.2, 3.0)


@settings(deadline=None, max_examples=30)
@given(seeds, temperatures, st.integers(1, 20))
def test_top_k_draws_from_the_k_likeliest(seed, temperature, k):
    logits = logits_of(seed)
    drawn = draws(logits, SamplingConfig(temperature=temperature, top_k=k, seed=seed))
    assert set(drawn) <= set(np.argsort(-logits)[:k])


@settings(deadline=None, max_examples=30)
@given(seeds, temperatures, st.floats(0.01, 0.999))
def test_top_p_draws_from_the_smallest_set_of_that_mass(seed, temperature, top_p):
    logits = logits_of(seed)
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    # A sum that equals top_p up to rounding may go either way.
    nucleus = order[: np.searchsorted(np.cumsum(p[order]), top_p + 1e-5) + 1]
    assert set(draws(logits, SamplingConfig(temperature=temperature, top_p=top_p, seed=seed))) <= set(nucleus)


@settings(deadline=None, max_examples=30)
@given(seeds, temperatures, st.floats(0.01, 0.99))
def test_min_p_is_a_threshold_relative_to_the_likeliest(seed, temperature, min_p):
    logits = logits_of(seed)
    drawn = draws(logits, SamplingConfig(temperature=temperature, min_p=min_p, seed=seed))
    ratio = np.exp((logits[drawn].astype(np.float64) - logits.max()) / temperature)
    assert ratio.min() >= min_p * (1 - 1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_filters_together_keep_what_transformers_keeps(seed):
    rng = np.random.default_rng(seed)
    config = SamplingConfig(
        temperature=float(rng.uniform(0.8, 3)),
        top_k=int(rng.integers(2, 9)),
        top_p=float(rng.uniform(0.6, 0.99)),
        min_p=float(rng.uniform(0.01, 0.2)),
        seed=seed,
    )
    allowed = allowed_by_hugging_face(logits_of(seed), config)
    drawn = [draws(logits_of(seed), SamplingConfig(**vars(config) | {"seed": s})) for s in range(20)]
    assert set(np.concatenate(drawn).tolist()) == allowed


def test_order_of_the_filters_matters_and_is_that_of_transformers():
    # Of .4 .3 .2 .1, top_k 2 leaves 4/7 and 3/7: top_p 0.5 then keeps one, where before top_k it would keep
    # two.
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))
    assert set(draws(logits, SamplingConfig(temperature=1.0, top_k=2, top_p=0.5))) == {0}
    assert set(draws(logits, SamplingConfig(temperature=1.0, top_p=0.5))) == {0, 1}


def test_ties_at_the_kth_place_stay():
    logits = np.asarray([1.0, 2.0, 1.0, 0.0], np.float32)
    assert set(draws(logits, SamplingConfig(temperature=1.0, top_k=2))) == {0, 1, 2}


def test_without_filters_frequencies_follow_the_softmax():
    logits = logits_of(5)
    drawn = [draws(logits, SamplingConfig(temperature=1.5, seed=seed)) for seed in range(50)]
    frequency = np.bincount(np.concatenate(drawn), minlength=VOCABULARY) / (50 * DRAWS)
    p = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    np.testing.assert_allclose(frequency, p, atol=5 * np.sqrt(0.25 / (50 * DRAWS)))


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(0, 5), st.floats(0.1, 1.0))
def test_temperature_zero_is_the_argmax_whatever_else(seed, top_k, top_p):
    logits = logits_of(seed)
    drawn = draws(logits, SamplingConfig(temperature=0.0, top_k=top_k, top_p=top_p, seed=seed))
    assert set(drawn) == {int(logits.argmax())}


def test_a_tiny_temperature_is_the_argmax_too():
    logits = logits_of(6)
    assert set(draws(logits, SamplingConfig(temperature=1e-38))) == {int(logits.argmax())}


def test_seeds_decide_the_draw():
    logits = logits_of(7)
    one, again, other = (draws(logits, SamplingConfig(temperature=2.0, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_changing_numbers_compiles_nothing():
    traces = []

    @jax.jit
    def counted(logits, key, numbers):
        traces.append(None)
        return sample(logits, key, numbers)

    for config in (
        SamplingConfig(),
        SamplingConfig(temperature=0.7, seed=3),
        SamplingConfig(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1),
    ):
        counted(jnp.asarray(logits_of(0))[None], jax.random.key(config.seed), config.numbers)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "--temperature must be 0 or a positive number, got -0.1"),
        ({"temperature": float("nan")}, "--temperature must be"),
        ({"top_k": -1}, "--top-k must be 0 .off. or more, got -1"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1 .off., got 0.0"),
        ({"top_p": 1.1}, "--top-p"),
        ({"min_p": 1.0}, "--min-p must be at least 0 .off. and below 1, got 1.0"),
        ({"min_p": -0.1}, "--min-p"),
    ],
)
def test_numbers_out_of_range_name_their_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


def test_generation_config_gives_defaults():
    hf = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 1, "eos_token_id": 3}
    assert SamplingConfig.from_generation_config(hf) == SamplingConfig(temperature=0.6, top_k=20)
    changed = SamplingConfig.from_generation_config(hf, temperature=0.0, top_k=None, seed=4)
    assert changed == SamplingConfig(temperature=0.0, top_k=20, seed=4)
    assert SamplingConfig.from_generation_config({"temperature": 0.6}).temperature == 0
    assert SamplingConfig.from_generation_config({"do_sample": True}).temperature == 1
    assert SamplingConfig.from_generation_config({}) == SamplingConfig()
