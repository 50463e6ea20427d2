"""Tokens per second of the decode step on a GPU, for models of random values in batches and contexts.

    python -m benchmarks.speed.decode_step [--models Qwen3-8B] [--forms svsk-r16 bf16] [--json results.json]
    python -m benchmarks.speed.decode_step --plot results.json plot.svg

`svsk-r16` has groups of 16 and sidecars of rank 9 in tiles of 512 rows, 4.6 bits per weight as stored: what
the recipe's budget buys on average. `svsk-r16, q4` has embedding and head in 4 bits, the others have int8.
`linear` has no codebook and no sidecar, `classic-r16` the recipe of that name. `bf16` is the dense decoder by
XLA, as many tokens in a dispatch. A step reads its weights once and the caches of all texts: `limit` is the
share of its time in which a kernel that does nothing else would read as many bytes. `launches` are the
entries of XLA's plan for a token of each text: kernels, calls of libraries and copies. Times are by the
clock, of calls one after another (`benchmarks.clock`), as in generating, where the host runs ahead; medians.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.clock import median_seconds
from benchmarks.plots import new_figure, save_figure
from benchmarks.speed.models import dense_parameters, packed_parameters
from benchmarks.speed.read_floor import CHUNKS, read
from pallas_kernels.aot import launch_plan
from svsk_jax.known_models import KNOWN
from svsk_jax.model import Decoder, ModelConfig
from svsk_jax.model.experts import Experts
from svsk_jax.model.fused_step import batch_bucket
from svsk_jax.model.laid_out import lay_out_parameters
from svsk_jax.runtime import steps
from svsk_jax.runtime.sampling import SamplingConfig

FORMS: dict[str, dict[str, Any]] = {
    "svsk-r16": {"rank": 9},
    "svsk-r16, q4": {"rank": 9, "embedding": "q4"},
    "linear": {"rank": 0, "companded": False},
    "classic-r16": {"rank": 16, "companded": False, "flat": True, "group": 64, "tile": (512, 1024)},
}
BATCHES = (1, 4, 16, 64)
CONTEXTS = (1024, 8192)
PROMPTS = (512, 2048)
ROOM = 0.85
"""Of the device's memory: what needs more is left out."""
COMPILED_AT_ONCE = 8
"""Programs, at most."""
CONTAINERS = ("CommandBuffer", "While", "Conditional", "Sequential", "DynamicSliceFusion")
"""What XLA's plan lists beside what is launched within."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    model: str
    form: str
    batch: int
    context: int
    ms: float
    """Milliseconds for one token of each text."""
    tokens_per_second: float
    limit: float | None
    """Share of what reading allows; None for bf16."""
    launches: int
    """For one token of each text."""


def decoder(config: ModelConfig, form: str) -> Decoder:
    key = jax.random.key(0)
    if form == "bf16":
        return Decoder(config, dense_parameters(config, key, jnp.bfloat16), jnp.bfloat16)
    return Decoder(config, lay_out_parameters(packed_parameters(config, key, **FORMS[form])), jnp.bfloat16)


def bytes_of_a_step(model: Decoder, batch: int, context: int) -> int:
    """Of the weights, without a table that only looks tokens up, and of keys and values. Of experts those
    that a step reads on average where all are as likely."""
    config, mixture = model.config, model.config.mixture
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    if not config.tie_word_embeddings:
        weights -= sum(leaf.nbytes for leaf in jax.tree.leaves(model.embedding))
    if mixture is not None:
        unread = (1 - mixture.num_experts_per_tok / mixture.num_experts) ** batch
        mlps = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Experts)]
        experts = [(mlp.gate_up, mlp.down) for mlp in mlps]
        weights -= round(unread * sum(leaf.nbytes for leaf in jax.tree.leaves(experts)))
    return weights + cache_bytes(config, batch, context)


def cache_bytes(config: ModelConfig, batch: int, positions: int) -> int:
    return 2 * 2 * batch * positions * config.num_layers * config.num_kv_heads * config.head_dim


def memory() -> int:
    return jax.devices()[0].memory_stats()["bytes_limit"]


def read_rate() -> float:
    """Bytes per second of a kernel that only reads."""
    words = jnp.arange(1 << 30, dtype=jnp.int32)
    rates = []
    for chunk in CHUNKS:
        reading = jax.jit(partial(read, chunk=chunk))
        rates.append(words.nbytes / median_seconds(partial(reading, words)))
    return max(rates)


def filled(config: ModelConfig, texts: int, context: int, *, fused: bool) -> steps.State:
    """For some texts, in as many places as the step has."""
    batch = batch_bucket(texts) if fused else texts
    slots = steps.slots_for(context)
    shape = (batch, slots, config.num_kv_heads, config.head_dim)

    def caches() -> tuple[jax.Array, ...]:
        return tuple(jnp.full(shape, 0.01, jnp.bfloat16) for _ in range(config.num_layers))

    length = jnp.full((batch,), context, jnp.int32) if fused else jnp.int32(context)
    # Of a mixture, each text has experts of its own, and places without one are alike.
    place = jnp.arange(batch, dtype=jnp.int32)
    return steps.State(caches(), caches(), length, jnp.where(place < texts, place, 0))


Step = Callable[[list[jax.Array], steps.State], steps.State]
"""A burst, from a model's leaves and the state before it to the state after it."""


def compiled_step(model: Decoder, texts: int, context: int, *, fused: bool) -> tuple[Step, int]:
    """A burst of tokens of each text, behind `context` positions, and its launches for one of them."""
    leaves, structure = jax.tree.flatten(model)
    key, numbers = jax.random.key(0), SamplingConfig().numbers

    def burst(leaves: list[jax.Array], state: steps.State) -> steps.State:
        start = state.lengths
        if fused:
            _, state = steps.fused_steps(structure, leaves, state, key, numbers, greedy=True)
        else:
            state, _ = jax.lax.scan(
                lambda state, _: (steps.step(structure, leaves, state, key, numbers)[1], None),
                state,
                length=steps.BURST,
            )
        # Every call starts at the same length: the cache has room for one burst behind it.
        return state._replace(lengths=start)

    state = jax.eval_shape(partial(filled, model.config, texts, context, fused=fused))
    with tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(burst, donate_argnums=1).lower(leaves, state)
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        return compiled, launches_of_a_token(launch_plan(Path(folder)))


def launches_of_a_token(plan: str) -> int:
    """Of XLA's plan for a burst, what the body of its loop launches."""
    # What is not indented follows the loop.
    body = re.split(r"^\d+: ", plan[plan.index("body:") :], maxsplit=1, flags=re.MULTILINE)[0]
    kinds = re.findall(r"^ +\d+: k(\w+)", body, re.MULTILINE)
    return sum(kind not in CONTAINERS for kind in kinds)


def step_seconds(run: Step, model: Decoder, state: steps.State) -> float:
    """Of one token of each text."""
    leaves, held = jax.tree.leaves(model), [state]

    def call() -> jax.Array:
        held[0] = run(leaves, held[0])
        # The caches are donated to the next call.
        return held[0].tokens + 0

    return median_seconds(call) / steps.BURST


def prefill_seconds(model: Decoder, tokens: int) -> float:
    leaves, structure = jax.tree.flatten(model)
    run = jax.jit(partial(steps.prefill, structure, steps.slots_for(tokens)))
    prompt = jax.random.randint(jax.random.key(1), (1, tokens), 0, model.config.vocab_size)
    arguments = (leaves, prompt, jnp.int32(tokens), jax.random.key(0), SamplingConfig().numbers)
    return median_seconds(lambda: run(*arguments))


def measure(
    name: str, form: str, rate: float, contexts: Sequence[int], prompts: Sequence[int]
) -> tuple[list[Case], dict[int, float]]:
    """Cases of a model in one form, and seconds to the first token by length of the prompt."""
    config = KNOWN[name]
    model = decoder(config, form)
    fused = form != "bf16"
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    room = (memory() * ROOM - weights) / (1 if fused else 2)

    def fits(context: int, batch: int) -> bool:
        return cache_bytes(config, batch_bucket(batch) if fused else batch, steps.slots_for(context)) <= room

    places = [place for place in itertools.product(contexts, BATCHES) if fits(*place)]
    # XLA chooses dense products by timing them, and must be alone with the device for that.
    with ThreadPoolExecutor(COMPILED_AT_ONCE if fused else 1) as pool:
        compiled = list(
            pool.map(
                lambda place: compiled_step(model, place[1], place[0] - steps.BURST, fused=fused), places
            )
        )
    cases = []
    for (context, batch), (run, launches) in zip(places, compiled, strict=True):
        seconds = step_seconds(run, model, filled(config, batch, context - steps.BURST, fused=fused))
        limit = bytes_of_a_step(model, batch, context) / rate / seconds if fused else None
        cases.append(
            Case(
                model=name,
                form=form,
                batch=batch,
                context=context,
                ms=1e3 * seconds,
                tokens_per_second=batch / seconds,
                limit=limit,
                launches=launches,
            )
        )
        print(describe(cases[-1]), flush=True)
    prefill = {tokens: prefill_seconds(model, tokens) for tokens in prompts}
    print(
        f"{name}, {form}: first token after", {n: f"{1e3 * s:.1f} ms" for n, s in prefill.items()}, flush=True
    )
    return cases, prefill


def describe(case: Case) -> str:
    share = "" if case.limit is None else f", {case.limit:.2f} of the limit"
    return (
        f"{case.model}, {case.form}, batch {case.batch}, context {case.context}: {case.ms:.2f} ms, "
        f"{case.tokens_per_second:.1f} tok/s{share}, {case.launches} launches"
    )


def table(document: dict[str, Any]) -> str:
    """In Markdown: a row for each model, batch and context."""
    cases = {(c["model"], c["batch"], c["context"], c["form"]): c for c in document["cases"]}
    forms = list(dict.fromkeys(c["form"] for c in document["cases"]))
    lines = [
        "| model | batch | context | "
        + " | ".join(f"{form}, tok/s" for form in forms)
        + " | of the limit | × bf16 |",
        "|---|---:|---:|" + "---:|" * (len(forms) + 2),
    ]
    for model, batch, context in dict.fromkeys(key[:3] for key in cases):
        row = [cases.get((model, batch, context, form)) for form in forms]
        speeds = ["–" if c is None else f"{c['tokens_per_second']:,.0f}" for c in row]
        ours, bf16 = row[0], cases.get((model, batch, context, "bf16"))
        share = "–" if ours is None else f"{ours['limit']:.2f}"
        ratio = (
            "–"
            if ours is None or bf16 is None
            else f"{ours['tokens_per_second'] / bf16['tokens_per_second']:.2f}"
        )
        lines.append(f"| {model} | {batch} | {context} | {' | '.join(speeds)} | {share} | {ratio} |")
    return "\n".join(lines)


def plot(document: dict[str, Any], path: Path) -> None:
    models = list(dict.fromkeys(c["model"] for c in document["cases"]))
    figure = new_figure(figsize=(3.6 * len(models), 3.2))
    axes = figure.subplots(1, len(models), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for form in dict.fromkeys(c["form"] for c in document["cases"]):
            found = [
                (c["batch"], c["tokens_per_second"])
                for c in document["cases"]
                if (c["model"], c["form"], c["context"]) == (model, form, CONTEXTS[0])
            ]
            axis.loglog(*zip(*found, strict=True), marker="o", label=form)
        axis.set(title=model, xlabel="texts at a time")
        axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].set_ylabel(f"tokens per second, context {CONTEXTS[0]}")
    axes[0][0].legend()
    figure.suptitle(f"{document['device']}, {document['date']}, jax {document['jax']}", fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["Qwen3-8B", "Qwen3-4B", "Qwen3-0.6B"], choices=KNOWN)
    parser.add_argument("--forms", nargs="+", default=[*FORMS, "bf16"], choices=[*FORMS, "bf16"])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--prompts", nargs="*", type=int, default=PROMPTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "SVG"))
    flags = parser.parse_args()
    if flags.plot:
        document = json.loads(flags.plot[0].read_text(encoding="utf-8"))
        plot(document, flags.plot[1])
        print(table(document))
        return
    if jax.default_backend() != "gpu":
        parser.error(f"the decode step runs on a GPU, this is {jax.default_backend()}")
    device = jax.devices()[0]
    rate = read_rate()
    document = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "read, TB/s": rate / 1e12,
        "cases": [],
        "first token, ms": {},
    }
    for name in flags.models:
        for form in flags.forms:
            cases, prefill = measure(name, form, rate, flags.contexts, flags.prompts)
            document["cases"] += [dataclasses.asdict(case) for case in cases]
            document["first token, ms"][f"{name}, {form}"] = {n: 1e3 * s for n, s in prefill.items()}
            if flags.json:
                flags.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(f"{document['device']}, {document['date']}, jax {document['jax']}; reading {rate / 1e12:.2f} TB/s")
    print(table(document))


if __name__ == "__main__":
    main()
