"""A launch of one of the step's kernels, with operands by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul.triton_operands import Refs

Work = Callable[[Refs, jax.Array, jax.Array], None]
"""A kernel's body: takes the references, its program and its row of x."""


def launch(
    work: Work,
    name: str,
    operands: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    programs: int,
    rows: int,
    warps: int,
    stages: int = 1,
    in_place: Mapping[str, str] | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Run `work` for each of some programs and rows of x; returns the results in order.

    Args:
        work: the kernel's body.
        name: of the kernel.
        operands: by name.
        results: shapes by name, none of an operand.
        programs, rows: of the grid.
        warps, stages: of a program.
        in_place: operands that results take the place of.
        interpret: run in interpret mode.
    """
    places, targets = list(operands), list(results)
    found = pl.pallas_call(
        partial(_kernel, names=(*operands, *results), work=work),
        grid=(programs, rows),
        out_shape=list(results.values()),
        input_output_aliases={
            places.index(operand): targets.index(result) for operand, result in (in_place or {}).items()
        },
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*operands.values())
    return list(found)


def _kernel(*refs: Any, names: tuple[str, ...], work: Work) -> None:
    work(dict(zip(names, refs, strict=True)), pl.program_id(0), pl.program_id(1))
