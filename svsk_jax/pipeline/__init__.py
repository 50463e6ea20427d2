"""The driver: decoder layers stream through load → calibrate → quantize → store, one at a time.

Activations come from the unquantized model, so that statistics do not depend on the recipe and can be saved
and used again.
"""

from svsk_jax.pipeline.autotune import Tuned, autotune
from svsk_jax.pipeline.calibrate import calibrate
from svsk_jax.pipeline.convert import convert
from svsk_jax.pipeline.plan import Plan, plan_model
from svsk_jax.pipeline.progress import OnProgress, Progress, Stopwatch
from svsk_jax.pipeline.quantize import QuantizeResult, quantize

__all__ = [
    "OnProgress",
    "Plan",
    "Progress",
    "QuantizeResult",
    "Stopwatch",
    "Tuned",
    "autotune",
    "calibrate",
    "convert",
    "plan_model",
    "quantize",
]
