"""Compile for a GPU that is not there, with XLA's own compiler, and read what came out: registers, spills,
and the instructions of the inner loop.

Needs, in the environment of the process, the wheels `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's own
version, `nvidia-cuda-nvcc` 13.0 (for ptxas), `nvidia-cuda-cuobjdump` and `nvidia-cuda-nvdisasm`; `make gate`
installs them apart, and sets the variables that `VARIABLES` names. XLA's compiler turns a Triton kernel into
PTX, which it writes out on request; ptxas of the same CUDA release assembles that again and reports what it
used.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WARP = 32
VARIABLES = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "JAX_PLATFORMS")
"""Of the environment, to be 1 and cpu before jax starts: the plugin asks for a driver otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU to compile for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    """Shared memory that a block can ask for."""
    shared_bytes_per_multiprocessor: int
    bandwidth: float
    """Bytes per second of its memory, by its data sheet."""
    l2_bytes: int
    clock: float
    """Cycles per second under load."""

    @property
    def ptxas(self) -> str:
        """What ptxas calls it."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


TARGETS = {
    "sm_80": Target(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        shared_bytes=166912,
        shared_bytes_per_multiprocessor=167936,
        bandwidth=2.04e12,
        l2_bytes=41943040,
        clock=1.41e9,
    ),
    "sm_89": Target(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        multiprocessors=128,
        shared_bytes=101376,
        shared_bytes_per_multiprocessor=102400,
        bandwidth=1.01e12,
        l2_bytes=75497472,
        clock=2.52e9,
    ),
    "sm_90": Target(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        multiprocessors=132,
        shared_bytes=232448,
        shared_bytes_per_multiprocessor=233472,
        bandwidth=3.35e12,
        l2_bytes=52428800,
        clock=1.7e9,
    ),
    "sm_120": Target(
        name="NVIDIA RTX PRO 6000 Blackwell",
        capability=(12, 0),
        multiprocessors=188,
        shared_bytes=101376,
        shared_bytes_per_multiprocessor=102400,
        bandwidth=1.79e12,
        l2_bytes=134217728,
        clock=2.4e9,
    ),
}
"""GPUs that kernels are compiled for, by architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str
    operands: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A compiled kernel."""

    name: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    cubin: bytes = dataclasses.field(repr=False)

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """Its machine code, disassembled when first asked for, which takes as long as compiling.

        Raises:
            RuntimeError: the disassembler failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.cubin)
            code = _run(_tool("cuobjdump"), "--dump-sass", path)
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code)
        return tuple(Instruction(address=int(a, 16), opcode=o, operands=r) for a, o, r in lines)

    @cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """Innermost loops that multiply on tensor cores, the longest first."""
        spans = []
        for instruction in self.instructions:
            if instruction.opcode.startswith("BRA"):
                found = re.search(r"0x([0-9a-f]+)", instruction.operands)
                if found and int(found[1], 16) < instruction.address:
                    spans.append((int(found[1], 16), instruction.address))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        bodies = [tuple(i for i in self.instructions if a <= i.address <= b) for a, b in inner]
        bodies = [body for body in bodies if any(i.opcode.startswith(("HMMA", "HGMMA")) for i in body)]
        return sorted(bodies, key=len, reverse=True)

    def count(self, pattern: str, body: Sequence[Instruction] | None = None) -> int:
        """Instructions whose opcode begins with a regular expression, of the kernel or of a part of it."""
        return sum(bool(re.match(pattern, i.opcode)) for i in (self.instructions if body is None else body))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function."""

    text: str
    """As XLA optimized it."""
    kernels: list[Kernel]
    """XLA's own included."""
    launched_alone: list[str]
    """Names of the kernels that the host launches one by one, each time: those outside of command buffers
    (CUDA graphs)."""


ONE = (("x", 1),)
"""The mesh of a program for one device: names and sizes of its axes."""


@cache
def _mesh(target: str, axes: tuple[tuple[str, int], ...] = ONE) -> Mesh:
    card, size = TARGETS[target], math.prod(size for _, size in axes)
    major, minor = card.capability
    description = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: {WARP}
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared_bytes_per_multiprocessor}
  threads_per_core_limit: {2048 if major != 12 and (major, minor) != (8, 9) else 1536}
  core_count: {card.multiprocessors}
  fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(card.bandwidth)}
  l2_cache_size: {card.l2_bytes}
  clock_rate_ghz: {card.clock / 1e9}
  device_memory_size: 85899345920
  shared_memory_per_block_optin: {card.shared_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{card.name}"
"""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description, topology=f"1x1x{size}"
    )
    names, sizes = zip(*axes, strict=True)
    kind = AxisType.Explicit if axes == ONE else AxisType.Auto
    devices = np.array(topology.devices[:size]).reshape(sizes)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def what_is_missing() -> list[str]:
    """Modules and variables that compiling needs and this process lacks."""
    missing = [module for module in ("jax_cuda13_plugin", "nvidia.cu13") if not _is_installed(module)]
    return missing + [name for name in VARIABLES if name not in os.environ]


@contextmanager
def targeting(target: str, axes: tuple[tuple[str, int], ...] = ONE) -> Iterator[Mesh]:
    """Within it, code is traced for a target, or for several of one host in a mesh of these axes.

    Raises:
        NotImplementedError: a wheel or one of the two variables is missing.
    """
    missing = what_is_missing()
    if missing:
        raise NotImplementedError(
            f"compiling for {target}, which is not here, needs {' and '.join(missing)}: `make gate` installs "
            "what it takes in .venv-gate, and shows the variables to set"
        )
    with jax.set_mesh(_mesh(target, axes)):
        yield _mesh(target, axes)


def compile_for(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    target: str,
    axes: tuple[tuple[str, int], ...] = ONE,
) -> Program:
    """Compile `function` of these arguments (arrays, abstract or not) for a target.

    Args:
        function: to compile.
        arguments: whole on every device, unless they are abstract and have a sharding of the mesh that
            `targeting` yields.
        target: of `TARGETS`.
        axes: of the mesh, where the program is for several devices.

    Raises:
        NotImplementedError: a wheel or one of the two variables is missing.
        RuntimeError: ptxas failed.
    """
    with tempfile.TemporaryDirectory() as folder, targeting(target, axes) as mesh:
        whole = NamedSharding(mesh, PartitionSpec())

        def abstract_of(a: Any) -> jax.ShapeDtypeStruct:
            divided = isinstance(a, jax.ShapeDtypeStruct) and a.sharding is not None
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if divided else whole)

        abstract = jax.tree.map(abstract_of, tuple(arguments))
        compiled = jax.jit(function).lower(*abstract).compile(compiler_options={"xla_dump_to": folder})
        kernels = [_assemble(path, TARGETS[target]) for path in sorted(Path(folder).glob("*.ptx"))]
        alone = re.findall(r"^\d+: k\w*Kernel\b[^\]]*\] (\w+)", launch_plan(Path(folder)), re.MULTILINE)
    return Program(
        text=compiled.as_text() or "",
        kernels=[kernel for kernel in kernels if kernel is not None],
        launched_alone=alone,
    )


def launch_plan(folder: Path) -> str:
    """What XLA launches of the program that was compiled with `xla_dump_to` this folder, a line each."""
    # The second is there where a pass has changed the first.
    return sorted(folder.glob("*.thunk_sequence*.txt"))[-1].read_text(encoding="utf-8")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _tool(name: str) -> Path:
    return Path(next(iter(importlib.import_module("nvidia.cu13").__path__))) / "bin" / name


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _assemble(path: Path, target: Target) -> Kernel | None:
    entry = re.search(r"\.entry (\w+)", path.read_text(encoding="utf-8"))
    if entry is None:
        return None
    cubin = path.with_suffix(".cubin")
    said = _run(_tool("ptxas"), "-v", f"-arch={target.ptxas}", path, "-o", cubin)

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, said)))

    return Kernel(
        name=entry[1],
        registers=total(r"Used (\d+) registers"),
        stack_bytes=total(r"(\d+) bytes stack"),
        spilled_bytes=total(r"(\d+) bytes spill"),
        shared_bytes=total(r"(\d+) bytes smem"),
        cubin=cubin.read_bytes(),
    )
