"""Quantize large language models to about 4.5 bits per weight, and run them, in JAX."""

import logging

# Only its tokenizers are wanted: that torch is not there is no news. It says so when it is first imported.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.evaluation.evaluate import evaluate, evaluate_texts
from svsk_jax.model.source import ModelSource
from svsk_jax.models import load_model, open_model
from svsk_jax.pipeline import calibrate, convert, quantize
from svsk_jax.quant.types import RECIPES, QuantConfig, recipe
from svsk_jax.runtime.generate import TextGenerator
from svsk_jax.runtime.sampling import SamplingConfig
from svsk_jax.xla_flags import avoid_crashing_fusions

avoid_crashing_fusions()

__all__ = [
    "RECIPES",
    "CalibrationConfig",
    "ModelSource",
    "QuantConfig",
    "SamplingConfig",
    "Statistics",
    "TextGenerator",
    "calibrate",
    "convert",
    "evaluate",
    "evaluate_texts",
    "load_model",
    "open_model",
    "quantize",
    "recipe",
]
