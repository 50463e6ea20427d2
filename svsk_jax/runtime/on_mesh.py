"""The steps of generating over the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.decode_step import Boxes
from svsk_jax.model.fused_step import batch_bucket
from svsk_jax.parallel import DATA, sharding
from svsk_jax.parallel.boxes import SPECS
from svsk_jax.parallel.decoder import on_mesh
from svsk_jax.runtime.sampling import SamplingNumbers
from svsk_jax.runtime.steps import State


def prefill_on_mesh(mesh: Mesh, prefill: Callable[..., Any]) -> Callable[..., Any]:
    """`steps.prefill`, without the arguments before the leaves, where those are of a `ParallelDecoder`'s
    shares. Devices along `data` do the same."""
    return on_mesh(mesh, prefill, (P(), P(), P(), P()), (P(), _specs(mesh, None, each=False)))


def step_on_mesh(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """`steps.step` or `steps.fused_steps`, likewise. Texts are divided over `data` where each device gets as
    many as a step takes."""

    def placed(
        leaves: list[jax.Array],
        state: State,
        key: jax.Array,
        numbers: SamplingNumbers,
        boxes: Boxes | None = None,
        **static: Any,
    ) -> tuple[jax.Array, State]:
        batch = _batch(mesh, state)
        specs = _specs(mesh, batch, each=state.lengths.ndim == 1)
        tokens = sharding(mesh, None, batch).spec
        run = on_mesh(
            mesh,
            lambda leaves, *arguments: step(leaves, *arguments, **static),
            (specs, P(), P(), *([] if boxes is None else [SPECS])),
            (tokens, specs),
        )
        return run(leaves, state, key, numbers, *([] if boxes is None else [boxes]))

    return placed


def divided(mesh: Mesh, state: State) -> State:
    """The state divided as a step leaves it. From another division the first step is a program of its own."""
    specs: Any = _specs(mesh, _batch(mesh, state), each=state.lengths.ndim == 1)
    shardings: list[Any] = [NamedSharding(mesh, spec) for spec in specs]
    return jax.device_put(state, State(*shardings))


def texts_of_device(mesh: Mesh, state: State) -> int:
    """How many of a state's texts a step has on each device."""
    return state.tokens.shape[0] // (1 if _batch(mesh, state) is None else mesh.shape[DATA])


def _batch(mesh: Mesh, state: State) -> str | None:
    """The logical axis of a state's texts; None where each device takes all."""
    texts, devices = state.tokens.shape[0], mesh.shape[DATA]
    divides = texts % devices == 0 and batch_bucket(texts // devices) == texts // devices
    return "batch" if divides else None


def _specs(mesh: Mesh, batch: str | None, *, each: bool) -> State:
    """How a state is divided; `each`: every text has its own length."""
    # One for the caches of all layers.
    cache: Any = sharding(mesh, batch, "tokens", "heads", None).spec
    texts = sharding(mesh, batch).spec
    return State(keys=cache, values=cache, lengths=texts if each else P(), tokens=texts)
