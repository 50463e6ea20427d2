"""Run by `make wheel` outside the tree, on the installed wheel: what a user gets is whole."""

import sys
from pathlib import Path

import jax.numpy as jnp

import convert
import pallas_kernels
import svsk_jax
from svsk_jax.cli import VERBS
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import InputMoment

for package in (svsk_jax, pallas_kernels, convert):
    assert package.__file__ is not None
    where = Path(package.__file__).resolve()
    assert Path(__file__).resolve().parent.parent not in where.parents or "build" in where.parts, where
weight = quantize_linear(
    jnp.ones((4, 64)), InputMoment(total=jnp.ones(64), tokens=jnp.int32(1)), svsk_jax.recipe("classic-r8")
)
assert weight.codes.shape == (4, 32)
assert "demo" in VERBS
print("the wheel works on", sys.version.split()[0])
