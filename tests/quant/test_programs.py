"""Programs that are compiled before there is anything to run them on."""

import jax
import jax.numpy as jnp
import numpy as np

from svsk_jax.pipeline.compile_ahead import together
from svsk_jax.pipeline.plan import Choices, drafted, measure_options
from svsk_jax.quant import programs
from svsk_jax.quant.joint import input_metric, output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, OutputSensitivity, TensorPlan, recipe


def test_what_was_compiled_ahead_is_what_runs(compiled):
    config, n, k = recipe("svsk-r16"), 24, 40
    draft = drafted(config)
    wanted = [*programs.of_options((n, k), draft, (draft.tile,)), *programs.of_quantization((n, k), config)]
    # Whatever other tests have compiled.
    jax.clear_caches()
    together(wanted)
    ahead = {program.function.__name__ for program in wanted}
    assert ahead <= set(compiled)
    compiled.clear()
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal((n, k)), jnp.float32)
    x, g = (jnp.asarray(rng.standard_normal((200, size)), jnp.float32) for size in (k, n))
    tokens = np.asarray(200, np.int32)
    moment = InputMoment(total=x.T @ x, tokens=jnp.asarray(tokens))
    weighted = InputMoment(total=np.asarray(x.T @ x), tokens=tokens)
    sensitivity = OutputSensitivity(blocks=(g.T @ g)[None], weights=jnp.ones((2, 100)), tokens=moment.tokens)
    for settings in (draft, config):
        metrics = input_metric(moment, weighted, settings), output_metric(sensitivity, n, settings)
        if settings is draft:
            measure_options(W, metrics, draft, Choices.of(draft))
            continue
        plan = TensorPlan(group=32, coefficients=config.coefficients, tile=config.tile, ranks=((3,),))
        quantize_joint(W, *metrics, plan, config)
    assert not ahead & set(compiled)
    assert "pack_int6" in compiled
