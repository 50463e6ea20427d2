"""How work is divided over devices and hosts."""

from svsk_jax.parallel.mesh import DATA, MODEL, make_mesh, parse_mesh, sharding

__all__ = ["DATA", "MODEL", "make_mesh", "parse_mesh", "sharding"]
