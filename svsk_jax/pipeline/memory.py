"""What a run may hold in memory: batches of text, where residual streams lie, and the largest memory of each
stage, from the model's configuration alone.

One plan is followed by the run and told by `svsk plan`. Of an accelerator it is the arrays on one device; on
a CPU, whose devices share the process's memory, what the process holds beyond Python and JAX, with copies on
each (fake) device and the programs that are compiled.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration.chunks import writes_own_text
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.model.config import ModelConfig
from svsk_jax.parallel import MODEL, make_mesh
from svsk_jax.pipeline.checks import default_dtype
from svsk_jax.pipeline.working_sets import (
    WRITTEN_AT_ONCE,
    Widths,
    ahead_bytes,
    block_bytes,
    device_bytes,
    layer_weights,
    moment_bytes,
    outer_weights,
    slab_bytes,
    stored_moment_bytes,
    tail_weights,
    text_bytes,
)

DEFAULT_CHUNK = 512
PROGRAMS = {"text": 0.2, "calibrate": 0.15, "sensitivity": 0.3, "plan": 0.45, "quantize": 0.85}
"""GB that compiling and compiled programs take of a process on a CPU by the end of each stage, with what the
allocator keeps of small arrays; measured (docs/decisions/0008)."""
TRIALS = 0.25
"""GB beyond the arrays that a stage takes of an accelerator, presumably where XLA tries products on operands
of its own; measured (docs/decisions/0008)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of a run, as far as memory hangs on them."""

    platform: str
    """As jax names it."""
    devices: int
    """Of all processes."""
    model: int
    """That share one copy of sums of moments."""
    copies: int
    """Devices whose arrays lie in the memory that is counted: on a CPU those of the process, else 1."""
    itemsize: int
    """Bytes of an activation or a dense weight."""
    processes: int = 1
    """That hold the devices."""

    @classmethod
    def of(cls, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> "Machine":
        """Of a mesh, by default that of all devices, and a dtype, by default the run's."""
        mesh = make_mesh() if mesh is None else mesh
        here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return cls(
            platform=mesh.devices.flat[0].platform,
            devices=mesh.size,
            model=mesh.shape[MODEL],
            copies=max(1, len(here)) if on_cpu else 1,
            itemsize=jnp.dtype(default_dtype() if dtype is None else dtype).itemsize,
            processes=len({device.process_index for device in mesh.devices.flat}),
        )

    @property
    def shares_host(self) -> bool:
        """Whether the memory that is counted is the host's."""
        return self.platform == "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How calibration keeps within a limit. Where streams lie changes no number of its result; the batch
    does, by rounding."""

    batch_tokens: int
    """Tokens that one device takes at once."""
    streams: Literal["devices", "store"]
    """Where residual streams lie between layers: on the devices, or off them, in `store_bytes` of the host's
    memory and beyond that on disk."""
    store_bytes: int
    """Of the host's memory, for the inputs that the Fisher pass walks back through and for streams."""
    peaks: dict[str, int]
    """Largest memory of each stage in bytes: text (where the model writes some), calibrate, sensitivity; of a
    whole run also plan and quantize."""


def chunk_length(model: ModelConfig, calibration: CalibrationConfig) -> int:
    """Tokens of a chunk."""
    return calibration.chunk_length or min(DEFAULT_CHUNK, model.max_position_embeddings)


def plan_run(
    model: ModelConfig,
    calibration: CalibrationConfig,
    machine: Machine,
    limit: int | None = None,
    *,
    has_text: bool = False,
) -> MemoryPlan:
    """The plan of a run that calibrates and quantizes, with the peaks of all its stages. Arguments and errors
    are those of `plan_calibration`; a limit that quantization does not keep within is refused first."""
    quantization = plan_quantization(model, machine, limit)
    plan = plan_calibration(model, calibration, machine, limit, has_text=has_text)
    return dataclasses.replace(plan, peaks=plan.peaks | quantization)


def plan_calibration(
    model: ModelConfig,
    calibration: CalibrationConfig,
    machine: Machine,
    limit: int | None = None,
    *,
    has_text: bool = False,
) -> MemoryPlan:
    """The largest batch, and with it the fastest place for streams, whose peak is within the limit.

    Args:
        model: its configuration.
        calibration: how much text, what is measured on it, and the largest batch.
        machine: the devices.
        limit: bytes of one accelerator, or of the process on a CPU; None plans what was asked for.
        has_text: whether the chunks are there already, so that the model writes none.

    Raises:
        ValueError: no batch is within the limit; says what is needed.
    """
    length = chunk_length(model, calibration)
    asked = max(1, calibration.batch_tokens // length)
    text = (
        0
        if has_text or not writes_own_text(calibration.calib)
        else text_bytes(model, machine.itemsize) + _programs(machine, "text")
    )
    if limit is None:
        return _calibration(model, calibration, machine, asked, "devices", None, text)
    _check(text, limit, "text", "give --calib documentation or another text that the model need not write")
    batches = sorted({asked, *(1 << power for power in range(asked.bit_length()))}, reverse=True)
    found = None
    for batch in batches:
        for streams in ("devices", "store"):
            found = _calibration(model, calibration, machine, batch, streams, limit, text)
            if max(found.peaks.values()) <= limit:
                return found
    assert found is not None
    stage = max(found.peaks, key=lambda name: found.peaks[name])
    advice = "a shorter --chunk-length"
    if stage == "sensitivity":
        advice += ", --fisher off"
    elif calibration.moments == "full":
        advice += ", --moments diagonal"
    if machine.copies > 1:
        advice += ", fewer devices"
    _check(found.peaks[stage], limit, stage, f"give {advice}, or a smaller model", smallest=True)
    raise AssertionError


def plan_quantization(model: ModelConfig, machine: Machine, limit: int | None = None) -> dict[str, int]:
    """Largest memory, in bytes, of the stages plan and quantize; it hangs on the model's shapes alone.

    Raises:
        ValueError: more than the limit.
    """
    layer = layer_weights(model)
    arrays = device_bytes(model, machine.platform)
    # An accelerator holds of a layer what is quantized, beside the linear at hand.
    arrays += (machine.itemsize + 4) * layer if machine.shares_host else layer
    if machine.shares_host:
        # Embedding and head are read, and rounded in slabs, before the first layer.
        arrays = max(
            arrays + ahead_bytes(model, machine.itemsize) + outer_weights(model),
            (machine.itemsize + 1) * outer_weights(model) + slab_bytes(model),
        )
    peaks = {stage: arrays + _programs(machine, stage) for stage in ("plan", "quantize")}
    if limit is not None:
        for stage, peak in peaks.items():
            _check(peak, limit, stage, "take a machine with more memory, or a model of narrower layers")
    return peaks


def gigabytes(limit: float | None) -> int | None:
    """`--max-memory` in bytes.

    Raises:
        ValueError: not more than 0.
    """
    if limit is None:
        return None
    if not 0 < limit < math.inf:
        raise ValueError(f"--max-memory {limit:g}: expected a number of gigabytes above 0, such as 8")
    return int(limit * 1e9)


def _check(needed: int, limit: int, stage: str, advice: str, smallest: bool = False) -> None:
    if needed > limit:
        least = " even a chunk at a time and with residual streams off the devices" if smallest else ""
        raise ValueError(
            f"--max-memory {limit / 1e9:.3g}: the stage `{stage}` needs {math.ceil(needed / 1e7) / 100:.2f} "
            f"GB{least}; raise the limit to that, or {advice}"
        )


def _programs(machine: Machine, stage: str) -> int:
    return int((PROGRAMS[stage] if machine.shares_host else TRIALS) * 1e9)


def _calibration(
    model: ModelConfig,
    calibration: CalibrationConfig,
    machine: Machine,
    batch: int,
    streams: Literal["devices", "store"],
    limit: int | None,
    text: int,
) -> MemoryPlan:
    """The plan with batches of so many chunks for each device."""
    size, copies, length = machine.itemsize, machine.copies, chunk_length(model, calibration)
    # As it was asked for, where that is so: a run's identity has it.
    batch_tokens = min(calibration.batch_tokens, batch * length)
    if batch == max(1, calibration.batch_tokens // length):
        batch_tokens = calibration.batch_tokens
    batch = min(batch, -(-calibration.chunks // machine.devices))
    of_batch = size * batch * length * model.hidden_size * copies
    batches = -(-calibration.chunks // (batch * machine.devices))
    here = batches * of_batch if streams == "devices" else min(batches, 3) * of_batch
    widths, tokens = Widths.of(model), batch * length
    full = calibration.moments == "full"
    summing, storing = (1, 1) if machine.shares_host else (machine.model, machine.devices)
    # Several processes first have whole matrices on each device, of which the first makes whole halves.
    storing = storing if machine.processes == 1 else 1
    moments, stored = moment_bytes(model, full, summing), stored_moment_bytes(model, full, storing)
    summed = moments if machine.processes == 1 else moment_bytes(model, full)
    written = WRITTEN_AT_ONCE * stored
    layer, outer = size * layer_weights(model), size * outer_weights(model)
    if machine.shares_host:
        # One is read ahead. Sums and what a batch adds, on each device; this layer's halves as they are made,
        # and those that are being written, put together of several devices' parts.
        together = written if machine.devices > 1 else 0
        weights, sums = (1 + copies) * layer, 2 * copies * moments + 2 * stored + written + together
        loading = outer + batches * of_batch
    else:
        # Halves lie where they are made until they are written: beside a batch's sums, or this layer's halves
        # as they are made.
        weights, sums = 2 * layer, max(2 * moments, summed + stored) + written
        loading = 0
    walking = here + weights + sums + copies * widths.forwards(tokens, length, size)
    peaks = {"text": text} if text else {}
    peaks["calibrate"] = max(loading, walking)
    kept = 0
    if calibration.measures_sensitivity:
        fisher = min(calibration.fisher_chunks, calibration.chunks)
        # Gradients of what is kept, and the streams that they are made from.
        kept_batches = -(-fisher // (batch * machine.devices))
        gradients = kept_batches * of_batch if streams == "devices" else min(kept_batches, 3) * of_batch
        # Sums, what a batch adds, on each device of a CPU what that gives, and what is being written.
        blocks = ((3 * copies if machine.shares_host else 2) + WRITTEN_AT_ONCE) * block_bytes(model)
        back = (
            gradients
            + weights
            + max(
                blocks + copies * widths.backwards(tokens, length, size),
                blocks + sums + copies * widths.forwards(tokens, length, size),
            )
        )
        logits, tail = widths.head(length, model.vocab_size, machine.platform), size * tail_weights(model)
        # The last layers' moments are still being written.
        beside = outer if machine.shares_host else written
        # An accelerator was seen to take the head a second time, as if for trials.
        tails = copies if machine.shares_host else 2
        head = here + gradients + beside + tails * tail + copies * logits
        peaks["sensitivity"] = max(back, head)
        kept = model.num_layers * kept_batches * size * batch * machine.devices * length * model.hidden_size
    room = int(calibration.fisher_memory * 1e9)
    off = batches * of_batch if streams == "store" else 0
    for stage in ("calibrate", "sensitivity"):
        if stage in peaks:
            peaks[stage] += _programs(machine, stage)
    if machine.shares_host:
        if limit is not None:
            room = min(room, max(0, limit - max(peaks.values())))
        room = min(room, kept + off)
        peaks = {stage: peak + (room if stage != "text" else 0) for stage, peak in peaks.items()}
    return MemoryPlan(
        batch_tokens=batch_tokens,
        streams=streams,
        store_bytes=room,
        peaks=peaks,
    )
