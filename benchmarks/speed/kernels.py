"""Speed of y = x Ŵᵀ by the kernels, on a GPU, beside what else can compute it; on a CPU what compiling tells.

    python -m benchmarks.speed.kernels [--models Qwen3-8B] [--rows 1 16] [--json results.json]
    python -m benchmarks.speed.kernels --plot results.json plot.svg

Correctness is the business of tests/pallas_kernels/test_device.py, which runs the kernels on the same device.

Every time is on the device, by its profiler: the sum of the kernels of a call, medians of at least 36 calls
one after another, each on another copy of the weight, so that no weight is in the cache (but those below 1
MB). `kernel` is the product alone, without what prepares x and without the epilogue that adds the sidecar.
`floor` is a kernel that only reads as many bytes as the weight has; `bf16` is x Wᵀ by XLA; `restore` restores
Ŵ and multiplies by XLA; `rank 0` has no sidecar and `linear` no companding either (both for one row of x);
tinygemm is torch's _weight_int4pack_mm with groups of 128, which has 4.25 bits per weight and no sidecar.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.plots import new_figure, save_figure
from benchmarks.speed.kernel_peers import peer_chains
from benchmarks.speed.read_floor import floor_works
from pallas_kernels.aot import what_is_missing
from pallas_kernels.device_time import call_times, without_graphs
from pallas_kernels.svsk_matmul import lay_out, svsk_matmul, triton_decode, triton_restore, triton_rows
from pallas_kernels.svsk_matmul.figures import abstract_weight, compiled_figures, default_blocks, estimate
from pallas_kernels.svsk_matmul.search import (
    LAUNCHES,
    Work,
    compile_chains,
    copies,
    copies_of,
    operands_of,
)
from pallas_kernels.svsk_matmul.shapes import MODELS
from pallas_kernels.svsk_matmul.synthetic import random_weight
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT

ROWS = (1, 8, 16, 64, 2048)
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_120")


def restored(x: jax.Array, weight: TritonWeight) -> jax.Array:
    dense = triton_restore.restore(weight, x.dtype)
    return jnp.matmul(x, dense.T, preferred_element_type=x.dtype)


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight.T, preferred_element_type=x.dtype)


def jax_works(n: int, k: int, m: int) -> tuple[dict[str, Work], int]:
    """Our products and XLA's, and the bytes of the weight."""
    forms: dict[str, dict[str, Any]] = {"svsk": {}}
    if m == 1:
        forms |= {"rank 0": {"rank": 0}, "linear": {"rank": 0, "companded": False}}
    works: dict[str, Work] = {}
    nbytes = 0
    for name, form in forms.items():
        weights = copies(lay_out(random_weight(jax.random.key(1), n, k, **form)))
        operands = operands_of(weights, m, k)
        works[name] = (svsk_matmul, operands)
        if name == "svsk":
            nbytes = weights[0].nbytes
            works |= {"restore": (restored, operands)} if 16 < m < FUSED_LIMIT else {}
    count = copies_of(2 * n * k)
    matrices = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) for i in range(count)]
    works["bf16"] = (dense, operands_of(matrices, m, k))
    return works, nbytes


def measure(model: str, launch: str, n: int, k: int, m: int) -> dict[str, Any]:
    works, nbytes = jax_works(n, k, m)
    works |= floor_works(nbytes)
    chains = compile_chains(list(works.values()))
    row: dict[str, Any] = {"model": model, "launch": launch, "n": n, "k": k, "m": m, "bytes": nbytes}
    timed = dict(zip(works, call_times(chains), strict=True))
    try:
        peers = peer_chains(n, k, m)
        timed |= dict(zip(peers, call_times(list(peers.values())), strict=True)) if peers else {}
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        row["peers failed"] = f"{type(error).__name__}: {error}"[:300]
    row |= {name: sum(kernels.values()) for name, kernels in timed.items()}
    products = (triton_decode.NAME, triton_rows.NAME, triton_restore.NAME)
    row["kernel"] = sum(time for name, time in timed["svsk"].items() if name in products)
    row["kernels"] = timed["svsk"]
    row["floor"] = min(row.pop(name) for name in list(row) if name.startswith("floor "))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    peers = [name for name in ("tinygemm", "gemlite", "bitsandbytes nf4") if any(name in row for row in rows)]
    names = ["svsk", "kernel", "floor", "rank 0", "linear", "restore", "bf16", *peers]
    lines = [
        "| matrix | M | MB | " + " | ".join(f"{name}, µs" for name in names) + " | floor / kernel |",
        "|---|---:|---:|" + "---:|" * (len(names) + 1),
    ]
    for row in rows:
        cells = [f"{row[name]:.1f}" if name in row else "–" for name in names]
        title = f"{row['model']} {row['launch']} {row['n']} × {row['k']}"
        share = row["floor"] / row["kernel"]
        lines.append(
            f"| {title} | {row['m']} | {row['bytes'] / 1e6:.1f} | " + " | ".join(cells) + f" | {share:.2f} |"
        )
    return "\n".join(lines)


def static_table(models: list[str]) -> str:
    """Of one shape of each model, without a GPU; bytes alone where its compiler is missing too."""
    missing = what_is_missing()
    if missing:
        lines = [f"no figures either: {' and '.join(missing)} missing, see `make gate`", "| matrix | MB |"]
        lines.append("|---|---:|")
    else:
        lines = ["| matrix | target | M | MB | instructions / weight | registers | estimate, µs |"]
        lines.append("|---|---|---:|---:|---:|---:|---:|")
    for model in models:
        n, k = MODELS[model]["gate_up"]
        weight = abstract_weight(n, k)
        if missing:
            lines.append(f"| {model} gate_up {n} × {k} | {weight.nbytes / 1e6:.1f} |")
            continue
        for target in TARGETS:
            for m in (1, 8, 16, 64):
                figures = compiled_figures(weight, m, target)
                loop = f"{figures.instructions:.2f}" if figures.instructions else f"≤ {figures.whole:.2f}"
                time = estimate(figures, weight, m, default_blocks(weight, m, target))
                lines.append(
                    f"| {model} gate_up {n} × {k} | {target} | {m} | {weight.nbytes / 1e6:.1f} | "
                    f"{loop} | {figures.registers} | {time:.1f} |"
                )
    return "\n".join(lines)


def plot(source: Path, target: Path) -> None:
    """Time of every matrix over its read floor, by rows of x."""
    document = json.loads(source.read_text(encoding="utf-8"))
    counts = sorted({row["m"] for row in document["rows"] if row["m"] < FUSED_LIMIT})
    figure = new_figure(figsize=(4 * len(counts), 3.6), layout="tight")
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axis, m in zip(axes, counts, strict=True):
        rows = sorted((row for row in document["rows"] if row["m"] == m), key=lambda row: row["bytes"])
        sizes = [row["bytes"] / 1e6 for row in rows]
        for name, style in (("svsk", "o-"), ("bf16", "s--"), ("tinygemm", "^:"), ("floor", "k-")):
            if all(name in row for row in rows):
                axis.plot(sizes, [row[name] for row in rows], style, label=name, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="MB of packed weight", title=f"M = {m}")
    axes[0].set_ylabel("µs")
    axes[0].legend()
    figure.suptitle(f"{document['device']}, {document['date']}")
    save_figure(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B"], choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "PLOT"))
    flags = parser.parse_args()
    if flags.plot:
        plot(*flags.plot)
        return
    without_graphs()
    if jax.default_backend() != "gpu":
        print("no GPU here: nothing is timed; bytes, compiled figures and roofline estimates")
        print(static_table(flags.models))
        return
    document: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "launches": LAUNCHES,
        "rows": [],
    }
    known: dict[tuple[int, int, int], dict[str, Any]] = {}
    for model in flags.models:
        for launch, (n, k) in MODELS[model].items():
            for m in flags.rows:
                if (n, k, m) not in known:
                    known[n, k, m] = measure(model, launch, n, k, m)
                    document["rows"].append(known[n, k, m])
                    if flags.json:
                        flags.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(f"{document['device']}, {document['date']}, jax {document['jax']}")
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
