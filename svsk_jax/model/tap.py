"""A way to see activations inside a traced layer."""

from collections.abc import Callable

import jax

Tap = Callable[[str, jax.Array], None]
"""Called with the name and value of each activation that linears read (see `parameters.LINEAR_INPUTS`)."""


def no_tap(name: str, value: jax.Array) -> None:
    """See nothing."""
