"""Measure a model's layers, there and back, from where an earlier run was cut short. Each layer's statistics
go onto the disk while the next ones are measured."""

from collections.abc import Callable
from typing import Any

import jax

from svsk_jax.calibration import store
from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.experts import Starved, moments_by_expert, sensitivities_by_expert
from svsk_jax.calibration.passes import Walk
from svsk_jax.calibration.streams import Streams
from svsk_jax.calibration.walk_state import START, Place, WalkState
from svsk_jax.parallel.distributed import agree, is_lead
from svsk_jax.parallel.placement import readable
from svsk_jax.pipeline.progress import OnProgress, Progress, Stopwatch
from svsk_jax.pipeline.run import CalibrationRun
from svsk_jax.storage.behind import Behind


class Measuring:
    """Both walks of a calibration.

    Args:
        run: on disk, with how far it has come.
        walk: over the model, at its start.
        calibration: what is measured.
        kept: the layers' inputs, from the way there for the way back.
        writer: writes statistics.
        watch: for the wall time of each stage.
        on_progress: called after each layer of each pass.
    """

    def __init__(
        self,
        run: CalibrationRun,
        walk: Walk,
        calibration: CalibrationConfig,
        kept: BlockInputs,
        writer: Behind,
        watch: Stopwatch,
        on_progress: OnProgress | None,
    ):
        self._run, self._walk, self._calibration = run, walk, calibration
        self._kept, self._writer, self._watch = kept, writer, watch
        self._on_progress = on_progress
        self._layers = walk.source.config.num_layers
        self._state = WalkState(run.walk, jax.process_index(), jax.process_count())
        begun, self._starved = agree(lambda: _so_far(run, self._state, self._layers))
        self._begun = Place(*begun)

    @property
    def _goes_back(self) -> bool:
        """Whether the way there was done before."""
        return self._begun.kind == "gradients"

    @property
    def _full(self) -> bool:
        return self._calibration.moments == "full"

    def all(self) -> dict[str, Starved]:
        """Measure what is not yet measured. By layer, the experts that had too few tokens; layers without
        any are left out."""
        if self._begun != START:
            self._take_up()
        self._forwards()
        if self._calibration.measures_sensitivity:
            self._backwards()
        in_order = (f"layers.{index}" for index in range(self._layers))
        return {layer: self._starved[layer] for layer in in_order if self._starved[layer]}

    def _take_up(self) -> None:
        """Bring the walk to where the run has come."""
        if self._calibration.measures_sensitivity:
            fisher = self._calibration.fisher_chunks
            for index in self._walk.replay(self._begun.layer, self._full, self._kept, fisher):
                self._report("replay", index + 1)
        rows = self._state.read(self._begun, self._walk.rows_shape, self._walk.dtype)
        (self._walk.gradients if self._goes_back else self._walk.streams).restore(rows)

    def _forwards(self) -> None:
        """Second moments of the inputs of the layers that are left."""
        keep = self._kept if self._calibration.measures_sensitivity else None
        first = self._layers if self._goes_back else self._begun.layer
        fisher = self._calibration.fisher_chunks
        for index, found in self._walk.forwards(self._full, keep, fisher, first):
            moments, few = moments_by_expert(found)
            self._starved[f"layers.{index}"] = few
            self._write(store.write_moments, index, moments, few)
            self._save(Place("streams", index + 1), self._walk.streams)
            self._report("calibrate", index + 1)
        if not self._goes_back:
            whole = readable(self._walk.head(self._full))
            if is_lead():
                self._writer.submit(store.write_head, self._run.made, whole)
        self._writer.finish()
        self._watch.lap("calibrate")

    def _backwards(self) -> None:
        """Sensitivities, and moments weighted by them, of the layers that are left."""
        if not self._goes_back:
            self._walk.start_backwards(self._calibration.seed)
        left = self._begun.layer if self._goes_back else self._layers
        for index, of_outputs, of_inputs in self._walk.backwards(self._kept, left):
            sensitivities, few = sensitivities_by_expert(of_outputs)
            weighted, few_weighted = moments_by_expert(of_inputs)
            few |= {f"{store.WEIGHTED}{name}": numbers for name, numbers in few_weighted.items()}
            self._starved[f"layers.{index}"] |= few
            self._write(store.write_sensitivities, index, sensitivities, weighted, few)
            self._save(Place("gradients", index), self._walk.gradients)
            self._report("sensitivity", self._layers - index)
        self._writer.finish()
        self._watch.lap("sensitivity")

    def _write(self, how: Callable[..., None], index: int, *found: Any) -> None:
        """Store what was found of a layer, while the next ones are measured."""
        whole = readable(found)
        if is_lead():
            self._writer.submit(how, self._run.made, index, *whole)

    def _save(self, place: Place, streams: Streams) -> None:
        """Store how far the walk has come, if it is time to."""
        if self._state.is_due:
            self._writer.finish()
            self._state.write(place, streams)

    def _report(self, stage: str, done: int) -> None:
        self._watch.lap(stage)
        if self._on_progress:
            self._on_progress(Progress(stage=stage, layer=done, layers=self._layers))


def _so_far(run: CalibrationRun, state: WalkState, layers: int) -> tuple[Place, dict[str, Starved]]:
    """How far a run has come, and the experts that had too few tokens until there, by layer."""
    place = state.place()
    goes_back = place.kind == "gradients"
    measured = range(layers) if goes_back else range(place.layer)
    try:
        return place, store.starved_experts(
            run.made, measured, range(place.layer, layers) if goes_back else ()
        )
    except ValueError as error:
        raise ValueError(
            f"--resume: a finished layer is damaged ({error}); remove {run.walk}, to measure all of them "
            "again"
        ) from error
