"""From what a user types after `--model` to something that runs."""

from pathlib import Path
from typing import Literal, overload

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.load import load_parameters
from convert.source import open_checkpoint
from svsk_jax.model.decoder import Decoder
from svsk_jax.model.experts import stack_experts
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.model.linear import restore
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.decoder import ParallelDecoder, load_parallel
from svsk_jax.pipeline.checks import default_dtype
from svsk_jax.storage.checkpoint import SavedModel, is_saved_model

Weights = Literal["auto", "packed", "dense"]


def open_model(model: str, *, revision: str | None = None, mesh: Mesh | None = None) -> ModelSource:
    """Open a folder that svsk saved, a checkpoint folder or file (safetensors, .bin, .gguf), or a hub id;
    local paths come first.

    Raises:
        ValueError: nothing of that name, or what is there is not a model; says what was tried.
        ConnectionError: the hub could not be reached.
    """
    path = Path(model).expanduser()
    if is_saved_model(path):
        return SavedModel(path, mesh)
    return open_checkpoint(model, revision=revision)


def automatic_weights() -> Weights:
    """Dense on a CPU, where small models are faster so, packed elsewhere."""
    return "dense" if jax.default_backend() == "cpu" else "packed"


@overload
def load_model(
    source: ModelSource, *, dtype: DTypeLike | None = None, weights: Weights = "packed", mesh: None = None
) -> Decoder: ...


@overload
def load_model(
    source: ModelSource, *, dtype: DTypeLike | None = None, weights: Weights = "packed", mesh: Mesh
) -> ParallelDecoder: ...


def load_model(
    source: ModelSource,
    *,
    dtype: DTypeLike | None = None,
    weights: Weights = "packed",
    mesh: Mesh | None = None,
) -> Decoder | ParallelDecoder:
    """The decoder, ready to run.

    Args:
        source: from `open_model`.
        dtype: of activations and dense weights; default f32 on CPU, bf16 elsewhere.
        weights: keep packed matrices packed, or restore them to dense ones, which takes more memory and is
            faster for many tokens at a time, on a CPU for small models always; auto: `automatic_weights`. On
            one device, and on each of a mesh, packed ones are laid out for its kernels, where dtype is bf16
            or f16 and it is an NVIDIA GPU from Ampere on, or for a CPU.
        mesh: devices over whose `model` axis the parameters are divided, from `make_mesh`; those along `data`
            hold copies.

    Raises:
        ValueError: a parameter does not divide over the mesh; names the largest `model` that works.
    """
    dtype = default_dtype() if dtype is None else dtype
    weights = automatic_weights() if weights == "auto" else weights
    if mesh is not None:
        return load_parallel(source, dtype, mesh, dense=weights == "dense")
    parameters = load_parameters(source, dtype)
    if weights == "dense":
        parameters = {
            path: value if isinstance(value, jax.Array) else restore(value, dtype=dtype)
            for path, value in parameters.items()
        }
    else:
        parameters = lay_out_for_device(parameters, dtype)
    return Decoder(source.config, stack_experts(parameters), dtype)
