"""Tensor-parallel decoding by the fused step."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from benchmarks.clock import median_seconds
from benchmarks.scale.exchange import BOXES, OPTIONS, exchanges
from benchmarks.scale.sizes import RandomSource, at_once, config_of, counts, machine, relative
from pallas_kernels.decode_step import LOST, Boxes
from pallas_kernels.device_time import Chain, call_times
from svsk_jax.model import Decoder, fused_step
from svsk_jax.model.laid_out import lay_out_for_device, lay_out_parameters
from svsk_jax.parallel import make_mesh, sharding
from svsk_jax.parallel.boxes import SPECS, PeerBoxes, why_no_boxes
from svsk_jax.parallel.decoder import ParallelDecoder, load_parallel, on_mesh
from svsk_jax.runtime import steps
from svsk_jax.runtime.on_mesh import divided, step_on_mesh
from svsk_jax.runtime.sampling import SamplingConfig

CONTEXT = 1024
FEW_LAYERS = 8
TOLERANCE = 1e-2
"""Of logits: x is rounded to f16, the residual stream's sums are in another order."""
Model = Decoder | ParallelDecoder


def on_devices(tiny: bool, layers: int | None, devices: int) -> Model:
    """The model on some devices; on one, as it runs without any mesh."""
    source = RandomSource(config_of(tiny, layers))
    if devices > 1:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        lay_out = _for_kernels if tiny else lay_out_for_device
        return load_parallel(source, jnp.bfloat16, mesh, lay_out=lay_out)
    parameters = lay_out_parameters(source.outer(jnp.bfloat16))
    for index in range(source.config.num_layers):
        layer = lay_out_parameters(source.layer(index, jnp.bfloat16))
        parameters |= {f"layers.{index}.{path}": value for path, value in layer.items()}
    return Decoder(source.config, parameters, jnp.bfloat16)


def _for_kernels(share: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    return lay_out_parameters(share)


def caches(model: Model, batch: int) -> tuple[jax.Array, ...]:
    config, slots = model.config, steps.slots_for(CONTEXT)
    heads = sharding(model.mesh, None, None, "heads", None) if isinstance(model, ParallelDecoder) else None
    shape = (batch, slots, config.num_kv_heads, config.head_dim)

    def filled(key: jax.Array) -> jax.Array:
        return 0.1 * jax.random.normal(key, shape, jnp.bfloat16)

    make = jax.jit(filled, out_shardings=heads)
    return tuple(make(jax.random.key(index)) for index in range(config.num_layers))


Call = Callable[[], jax.Array]


def burst(
    model: Model,
    batch: int,
    tiny: bool,
    boxes: PeerBoxes | None = None,
    options: dict[str, Any] | None = None,
) -> Call:
    """`steps.BURST` greedy tokens of each text, behind as many positions at each call; sums by boxes, or by
    XLA with some of its options. The first call does not wait for other devices, and means nothing."""
    return lowered_burst(model, batch, tiny, boxes, options)()


def lowered_burst(
    model: Model,
    batch: int,
    tiny: bool,
    boxes: PeerBoxes | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[], Call]:
    """What compiles a `burst`, which several threads may do for several."""
    leaves, structure = jax.tree.flatten(model.shares if isinstance(model, ParallelDecoder) else model)
    step: Any = partial(steps.fused_steps, structure, interpret=tiny)
    if isinstance(model, ParallelDecoder):
        step = step_on_mesh(model.mesh, step)
    key, numbers = jax.random.key(0), SamplingConfig().numbers

    def again(leaves: list[jax.Array], state: steps.State, held: Boxes | None) -> steps.State:
        _, after = step(leaves, state, key, numbers, held, greedy=True)
        return after._replace(lengths=state.lengths)

    turns = steps.BURST * exchanges_of(model, batch, greedy=True)
    lengths = jnp.full((batch,), CONTEXT - steps.BURST, jnp.int32)
    state = steps.State(caches(model, batch), caches(model, batch), lengths, jnp.zeros(batch, jnp.int32))
    held = [divided(model.mesh, state) if isinstance(model, ParallelDecoder) else state]

    def taken(turns: int, wait: bool = True) -> Boxes | None:
        return None if boxes is None else boxes.take(turns, wait=wait)

    jitted = jax.jit(again, donate_argnums=1, compiler_options=options or {})
    lowered = jitted.lower(leaves, held[0], taken(0))

    def compiled() -> Call:
        run, calls = lowered.compile(), itertools.count()

        def call() -> jax.Array:
            if next(calls) == 0:
                held[0] = steps.rehearsed(lambda state: run(leaves, state, taken(turns, wait=False)), held[0])
            else:
                held[0] = run(leaves, held[0], taken(turns))
            # The caches are donated to the next call.
            return held[0].tokens + 0

        return call

    return compiled


def exchanges_of(model: Model, batch: int, *, greedy: bool) -> int:
    share = model.shares if isinstance(model, ParallelDecoder) else model
    return fused_step.exchanges(share, batch, greedy=greedy)


def lowered_logits(model: Model, batch: int, tiny: bool, boxes: PeerBoxes | None) -> Callable[[], Call]:
    """What compiles the logits of one step, on the first device."""
    work = partial(fused_step.fused_step, interpret=tiny)
    tokens = jnp.arange(batch, dtype=jnp.int32) * 7 + 3
    lengths = jnp.full((batch,), CONTEXT // 2, jnp.int32)
    arguments = (tokens, caches(model, batch), caches(model, batch), lengths)
    turns = exchanges_of(model, batch, greedy=False)

    def given(turns: int, wait: bool = True) -> tuple[Any, ...]:
        held = [] if boxes is None else [boxes.take(turns, wait=wait)]
        return (model.shares if isinstance(model, ParallelDecoder) else model, *arguments, *held)

    step: Callable[..., Any] = work
    if isinstance(model, ParallelDecoder):
        heads = sharding(model.mesh, None, None, "heads", None).spec
        step = on_mesh(
            model.mesh,
            lambda share, *given: work(share, *given[:4], boxes=given[4] if len(given) > 4 else None),
            (P(), heads, heads, P(), *([] if boxes is None else [SPECS])),
            (P(), heads, heads),
        )
    lowered = jax.jit(step).lower(*given(0))

    def compiled() -> Call:
        run = lowered.compile()

        def call() -> jax.Array:
            if boxes is not None:
                jax.block_until_ready(run(*given(turns, wait=False)))
            return jax.device_put(run(*given(turns))[0], jax.devices()[0])

        return call

    return compiled


def decode(tiny: bool, report: Callable[..., None]) -> None:
    """Times, then what the logits of fewer layers are compared to: a limit of time cuts off the end."""
    report(**machine())
    batches = (1, 8) if tiny else (1, 16)
    cases = list(itertools.product(batches, cases_of(tiny, None, counts(tiny), report)))
    report(made=True)
    bursts = [lowered_burst(model, batch, tiny, boxes) for batch, (_, model, _, boxes) in cases]
    report(lowered=True)
    calls = at_once(bursts)
    report(compiled=True)
    alone: dict[int, float] = {}
    for (batch, (devices, _, way, _)), call in zip(cases, calls, strict=True):
        ms = 1e3 * median_seconds(call) / steps.BURST
        alone.setdefault(batch, ms)
        report(
            devices=devices,
            way=way,
            batch=batch,
            ms=ms,
            tokens_per_second=1e3 * batch / ms,
            times_one_device=alone[batch] / ms,
            lost=bool(jnp.any(call() == LOST)),
        )
    del cases, bursts, calls
    cases = list(itertools.product(batches, cases_of(tiny, FEW_LAYERS, counts(tiny), report)))
    calls = at_once([lowered_logits(model, batch, tiny, boxes) for batch, (_, model, _, boxes) in cases])
    expected: dict[int, jax.Array] = {}
    for (batch, (devices, _, way, _)), call in zip(cases, calls, strict=True):
        found = call()
        if devices == 1:
            expected[batch] = found
        else:
            compare(devices, way, batch, found, expected[batch], report)


def cases_of(
    tiny: bool, layers: int | None, numbers: Sequence[int], report: Callable[..., None]
) -> list[tuple[int, Model, str, PeerBoxes | None]]:
    """Numbers of devices, in their order, with the model on them and each way to add up."""
    models = [(devices, on_devices(tiny, layers, devices)) for devices in numbers]
    return [
        (devices, model, way, boxes)
        for devices, model in models
        for way, boxes in ways_of(model, report).items()
    ]


def boxes_of(model: Model, report: Callable[..., None]) -> PeerBoxes | None:
    if not isinstance(model, ParallelDecoder):
        return None
    reason = why_no_boxes(model.mesh)
    if reason is not None:
        report(devices=model.mesh.size, way=BOXES, impossible=reason)
        return None
    return PeerBoxes(model.mesh)


def ways_of(model: Model, report: Callable[..., None]) -> dict[str, PeerBoxes | None]:
    """Ways to add up, with what each takes."""
    boxes = boxes_of(model, report)
    return ({} if boxes is None else {BOXES: boxes}) | {"XLA": None}


def compare(
    devices: int, way: str, batch: int, found: jax.Array, expected: jax.Array, report: Callable[..., None]
) -> None:
    error = relative(found, expected)
    same = jnp.mean(jnp.argmax(found, axis=-1) == jnp.argmax(expected, axis=-1))
    report(
        devices=devices,
        layers=FEW_LAYERS,
        way=way,
        batch=batch,
        logits_error=error,
        logits_equal=error < TOLERANCE,
        same_likeliest=float(same),
    )


def with_options(tiny: bool, report: Callable[..., None]) -> None:
    """Sums alone by each way, and the step at batch 1 on two devices by XLA as it is, by the fastest of its
    options and by boxes."""
    found = exchanges(tiny, report)
    model = on_devices(tiny, FEW_LAYERS, 2)
    ways = ["as it is"]
    by_xla = [(us, way) for way, us in found.items() if way != BOXES]
    if by_xla and not tiny:
        ways.append(min(by_xla)[1])
    boxes = boxes_of(model, report)
    if boxes is not None:
        ways.append(BOXES)
    for way in dict.fromkeys(ways):
        held, options = (boxes, {}) if way == BOXES else (None, {} if tiny else OPTIONS[way])
        ms = 1e3 * median_seconds(burst(model, 1, tiny, held, options)) / steps.BURST
        report(devices=2, layers=model.config.num_layers, batch=1, way=way, ms=ms)


def kernels(tiny: bool, report: Callable[..., None]) -> None:
    """Device time of a token on one and on two devices, by kernel, without CUDA graphs."""
    cases = cases_of(tiny, FEW_LAYERS, counts(tiny)[:2][::-1], report)
    for batch, (devices, model, way, boxes) in itertools.product((1,) if tiny else (1, 16), cases):
        call = burst(model, batch, tiny, boxes)
        if tiny:
            report(devices=devices, way=way, batch=batch, tokens=call().tolist())
            continue
        [times] = call_times([Chain(call, steps.BURST)])
        each = {name: us / devices for name, us in sorted(times.items(), key=lambda item: -item[1])}
        report(
            devices=devices,
            layers=model.config.num_layers,
            way=way,
            batch=batch,
            us_of_a_token=sum(each.values()),
            us_of_exchange_by_xla=sum(us for name, us in each.items() if _exchanges(name)),
            us_by_kernel={name: round(us, 1) for name, us in each.items() if us > 1},
        )


def _exchanges(name: str) -> bool:
    plain = name.lower().replace("_", "").replace("-", "")
    return any(word in plain for word in ("allreduce", "allgather", "nccl"))
