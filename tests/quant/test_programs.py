"""Programs that are compiled before there is anything to run them on."""

import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.pipeline.compile_ahead import together
from svsk_jax.pipeline.plan import Choices, drafted, measure_options
from svsk_jax.quant import programs
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.half_moment import halved
from svsk_jax.quant.joint import input_metric, output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, OutputSensitivity, TensorPlan, recipe


def test_what_was_compiled_ahead_is_what_runs(compiled):
    config, n, k = recipe("svsk-r16"), 24, 40
    draft = drafted(config)
    wanted = [*programs.of_options((n, k), draft, (draft.tile,)), *programs.of_quantization((n, k), config)]
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal((n, k)), jnp.float32)
    x, g = (jnp.asarray(rng.standard_normal((200, size)), jnp.float32) for size in (k, n))
    tokens = np.asarray(200, np.int32)
    moment = InputMoment(total=x.T @ x, tokens=jnp.asarray(tokens))
    half = jax.device_get(halved(moment))
    sensitivity = OutputSensitivity(blocks=(g.T @ g)[None], weights=jnp.ones((2, 100)), tokens=moment.tokens)
    # Whatever this and other tests have compiled.
    jax.clear_caches()
    with together(wanted):
        pass
    ahead = {program.function.__name__ for program in wanted}
    assert ahead <= set(compiled)
    compiled.clear()
    for settings in (draft, config):
        moment = half.whole
        metrics = input_metric(moment, half, settings), output_metric(sensitivity, n, settings)
        if settings is draft:
            measure_options(W, metrics, draft, Choices.of(draft))
            continue
        plan = TensorPlan(group=32, coefficients=config.coefficients, tile=config.tile, ranks=((3,),))
        result = quantize_joint(W, *metrics, plan, config)
        layer_error(W, result.restored, moment)
    # Of numbers and of zeros, whatever the linear's shape.
    assert set(compiled) == {"convert_element_type", "broadcast_in_dim"}
    assert len(compiled) < 6


MANY = 1000


class Compiling:
    """Counts compilations; at the first one something happens."""

    def __init__(self, at_first):
        self.at_first, self.begun = at_first, 0

    def lower(self):
        return self

    def compile(self):
        self.begun += 1
        if self.begun == 1:
            self.at_first()
        time.sleep(0.02)


def fail():
    raise ValueError("no such operation")


def test_one_that_cannot_be_compiled_ends_it_and_says_so_where_it_is_called():
    function = Compiling(fail)
    with together([programs.Program(function, ())] * MANY):
        pass
    assert 0 < function.begun < MANY
    jitted = jax.jit(lambda x: fail())
    with together([programs.Program(jitted, (1.0,))]):
        pass
    with pytest.raises(ValueError, match="no such operation"):
        jitted(1.0)


def test_an_interrupt_leaves_the_rest_uncompiled():
    queued, main = threading.Event(), threading.get_ident()

    def interrupt():
        assert queued.wait(20)
        # By then it waits: a signal that comes just before is seen when the wait is over.
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)

    def wanted():
        yield from [programs.Program(function, ())] * MANY
        queued.set()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    function = Compiling(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), together(wanted()):
            pass
    finally:
        signal.signal(signal.SIGINT, handler)
    assert 0 < function.begun < MANY


def test_an_error_beside_it_leaves_nothing_compiling():
    begun = threading.Event()
    function = Compiling(begun.set)

    def stop():
        with together([programs.Program(function, ())] * MANY):
            assert begun.wait(20)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    left_off = function.begun
    assert 0 < left_off < MANY
    time.sleep(0.1)
    assert function.begun == left_off
