"""The device that code is traced for."""

from typing import Any

import jax


def target_device() -> Any:
    """That of the mesh in use, maybe abstract, else the default device."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return of_mesh
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def is_hopper(device: Any) -> bool:
    """Whether it multiplies in groups of four warps (compute capability 9). An abstract device, which has no
    capability, is known by its name."""
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        return str(capability).startswith("9.")
    return any(name in device.device_kind for name in ("H100", "H200", "H800", "H20"))
