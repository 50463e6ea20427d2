"""The device that code is traced for."""

from typing import Any

import jax


def target_device() -> Any:
    """That of the mesh in use, maybe abstract, else the default device."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return of_mesh
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices()[0]
