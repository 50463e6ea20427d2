"""Flags that say over which devices, of how many processes, work is divided."""

import dataclasses

from jax.sharding import Mesh

from svsk_jax.cli.common import console
from svsk_jax.parallel import distributed, parse_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshFlags:
    """Several devices, and several processes."""

    mesh: str | None = None
    """Devices to divide the work over, such as data=2,model=4: texts and layers over `data`, rows of second
    moments and of matrices over `model`. By default all along `data`."""
    distributed: bool = False
    """One of several processes that run this same command, on one host or on many with one file system.
    Where a cluster's scheduler (Slurm, Open MPI, Kubernetes, TPU pods) tells who they are, this is enough."""
    coordinator: str | None = None
    """HOST:PORT of process 0, which listens there."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""

    def join(self) -> Mesh | None:
        """Join the other processes, if there are any, and make the mesh, if one is asked for. Comes before
        any use of a device."""
        told = {
            "--coordinator": self.coordinator,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        given = [flag for flag, value in told.items() if value is not None]
        if given and not self.distributed:
            raise ValueError(f"{given[0]}: goes with --distributed")
        if self.distributed:
            distributed.initialize(self.coordinator, self.num_processes, self.process_id)
            console.quiet = not distributed.is_lead()
        return None if self.mesh is None else parse_mesh(self.mesh)
