"""How large a model is under a recipe, from its configuration alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul import common_form
from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.laid_out import lay_out_parameters, transpose_parameters
from svsk_jax.model.parameters import (
    EXPERT_LINEARS,
    EXPERTS,
    layer_shapes,
    outer_shapes,
    parameter_shapes,
    quantized_linears,
    quantized_paths,
)
from svsk_jax.pipeline.plan import Plan, fixed_plans, linear_shapes
from svsk_jax.quant.budget import Budget, base_bytes, planned_bytes, predict, sidecar_bytes
from svsk_jax.quant.types import EMBEDDING_GROUP, MAX_RANK, QuantConfig, TensorPlan
from svsk_jax.storage.packing import abstract

LAYOUTS: dict[str, tuple[Callable[[Any], Any], DTypeLike]] = {
    "NVIDIA GPU, packed": (lay_out_parameters, jnp.bfloat16),
    "CPU, packed": (transpose_parameters, jnp.float32),
}
"""By name, how a model is laid out to run from packed weights, and the dtype of its activations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a model before there is one."""

    budget: Budget
    """Stored tensors. Metadata and tokenizer come on top."""
    exact: bool
    """Whether `budget` is what will be stored, to the byte. Where ranks are still to be allocated the linears
    take at most that much, and less by at most a rank."""
    in_memory: dict[str, int]
    """Bytes of all parameters, ready to run, by layout; where ranks are still to be allocated, for equal
    ones that fill the budget."""


def model_sizes(model: ModelConfig, recipe: QuantConfig | Plan) -> Sizes:
    """Sizes of a model of a configuration under a recipe, or under the plan of an earlier `autotune`.

    Raises:
        ValueError: the plan is another model's.
    """
    config = recipe.config if isinstance(recipe, Plan) else recipe
    if isinstance(recipe, Plan):
        recipe.check_model(model)
    flat = config.scales == "flat"
    allocated = config.bits is not None and not isinstance(recipe, Plan)
    plans = recipe.tensors if isinstance(recipe, Plan) else fixed_plans(model, config)
    budget = predict(parameter_shapes(model), quantized_paths(model), config)
    if config.bits is not None and allocated:
        # What is allocated is one sum for the model, rounded down once.
        linears = int(config.bits * budget.linear_weights / 8)
    elif flat:
        linears = budget.linear_bytes
    else:
        shapes = linear_shapes(model)
        linears = sum(planned_bytes(shapes[name], plan, config.scales) for name, plan in plans.items())
    total = budget.total_bytes - budget.linear_bytes + linears
    budget = dataclasses.replace(budget, linear_bytes=linears, total_bytes=total)
    if flat or allocated:
        equal = functools.cache(lambda shape: _equal_ranks(shape, config))
        plans = {name: equal(shape) for name, shape in linear_shapes(model).items()}
    memory = {name: _in_memory(model, config, plans, *layout) for name, layout in LAYOUTS.items()}
    memory["dense bfloat16"] = 2 * budget.total_weights
    return Sizes(budget=budget, exact=not allocated, in_memory=memory)


def _equal_ranks(shape: tuple[int, int], config: QuantConfig) -> TensorPlan:
    """One rank in every tile: the recipe's, or the largest that its bits pay for."""
    n, k = shape
    rank = config.rank
    if config.bits is not None:
        spare = config.bits * n * k / 8 - base_bytes(shape, config.groups[0], config.scales, config.codebook)
        one = sidecar_bytes(shape, dataclasses.replace(config, rank=1, bits=None))
        rank = min(MAX_RANK, max(0, int(spare / one)))
    rows, columns = (len(tile_spans(n, config.tile.rows)), len(tile_spans(k, config.tile.columns)))
    return TensorPlan(
        group=config.groups[0],
        coefficients=config.coefficients if config.codebook == "companded" else None,
        tile=config.tile,
        ranks=((rank,) * columns,) * rows,
    )


def _abstract_weight(shape: tuple[int, ...], plan: TensorPlan, config: QuantConfig) -> Any:
    tiles = {"tile": [plan.tile.rows, plan.tile.columns], "ranks": plan.ranks}
    return abstract(
        {
            "kind": "svsk",
            "shape": shape,
            "group": plan.group,
            "scales": config.scales,
            "codebook": "linear" if plan.coefficients is None else "companded",
            "sidecar": tiles if plan.has_sidecar else None,
        }
    )


def _abstract_embedding(shape: tuple[int, ...], config: QuantConfig) -> Any:
    form: dict[str, Any] = {"kind": "int8"}
    if config.embedding == "q4":
        form = {"kind": "svsk", "group": EMBEDDING_GROUP, "sidecar": None}
        form |= {"scales": config.scales, "codebook": config.codebook}
    return abstract({**form, "shape": shape})


def _stack_experts(layer: dict[str, Any]) -> None:
    """What `stack_experts` makes of a layer, without values."""
    for name in EXPERT_LINEARS:
        paths = [path for path in layer if path.startswith(EXPERTS) and path.endswith(f".{name}.weight")]
        weights = [layer.pop(path) for path in paths]
        first, (group, tile, rank) = weights[0], common_form(weights)
        sidecar = None
        if tile is not None:
            grid = [len(tile_spans(side, cut)) for side, cut in zip(first.shape, tile, strict=True)]
            sidecar = {"tile": tile, "ranks": ((rank,) * grid[1],) * grid[0]}
        fields = {"shape": first.shape, "scales": first.scale_kind, "codebook": first.codebook}
        alike = abstract({"kind": "svsk", "group": group, "sidecar": sidecar, **fields})
        leaves, structure = jax.tree.flatten(alike)
        stacks = [jax.ShapeDtypeStruct((len(weights), *leaf.shape), leaf.dtype) for leaf in leaves]
        layer[f"{EXPERTS}.{name}.weight"] = jax.tree.unflatten(structure, stacks)


def _in_memory(
    model: ModelConfig,
    config: QuantConfig,
    plans: Mapping[str, TensorPlan],
    lay_out: Callable[[Any], Any],
    dtype: DTypeLike,
) -> int:
    """Bytes of all parameters as `lay_out` leaves them; layers whose plans are alike are looked at once."""

    def nbytes(parameters: dict[str, Any]) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lay_out, parameters))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def dense(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    outer: dict[str, Any] = {
        path: _abstract_embedding(shape, config)
        if len(shape) == 2 and config.embedding != "bfloat16"
        else dense(shape)
        for path, shape in outer_shapes(model).items()
    }
    total, known = nbytes(outer), {}
    for index in range(model.num_layers):
        linears = quantized_linears(model, index)
        chosen = (linears, *(plans[f"layers.{index}.{name}"] for name in linears))
        if chosen not in known:
            shapes = layer_shapes(model, index)
            layer: dict[str, Any] = {path: dense(shape) for path, shape in shapes.items()}
            for name in linears:
                path = f"{name}.weight"
                layer[path] = _abstract_weight(shapes[path], plans[f"layers.{index}.{name}"], config)
            if model.has_experts(index):
                _stack_experts(layer)
            known[chosen] = nbytes(layer)
        total += known[chosen]
    return total
