"""A way to see activations inside a traced layer, and to reach the outputs of its linears."""

from collections.abc import Callable

import jax

Tap = Callable[[str, jax.Array], jax.Array]
"""Called with the name and value of each activation that linears read (`parameters.LINEAR_INPUTS`) and of
each linear's output (`parameters.QUANTIZED_LINEARS`; for experts see `Experts`). The layer goes on with
what it returns."""


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """Leave every value as it is."""
    return value
