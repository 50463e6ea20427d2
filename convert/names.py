"""One table of names, parameter path ↔ Hugging Face ↔ GGUF, and the check that a checkpoint has these."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from convert.stacked import unstack
from convert.tensors import RawTensor
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import EXPERT_LINEARS, EXPERTS, parameter_shapes

Format = Literal["hf", "gguf"]
LISTED = 20


@dataclasses.dataclass(frozen=True)
class Name:
    """A parameter's names; `heads` is the config field that counts heads whose rows llama.cpp reorders."""

    path: str
    hf: str
    gguf: str
    heads: Literal["num_heads", "num_kv_heads"] | None = None


OUTER = (
    Name("embedding.weight", "model.embed_tokens.weight", "token_embd.weight"),
    Name("final_norm.scale", "model.norm.weight", "output_norm.weight"),
    Name("head.weight", "lm_head.weight", "output.weight"),
)
LAYER = (
    Name("input_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    Name("attention.q.weight", "self_attn.q_proj.weight", "attn_q.weight", "num_heads"),
    Name("attention.q.bias", "self_attn.q_proj.bias", "attn_q.bias", "num_heads"),
    Name("attention.k.weight", "self_attn.k_proj.weight", "attn_k.weight", "num_kv_heads"),
    Name("attention.k.bias", "self_attn.k_proj.bias", "attn_k.bias", "num_kv_heads"),
    Name("attention.v.weight", "self_attn.v_proj.weight", "attn_v.weight"),
    Name("attention.v.bias", "self_attn.v_proj.bias", "attn_v.bias"),
    Name("attention.o.weight", "self_attn.o_proj.weight", "attn_output.weight"),
    Name("attention.o.bias", "self_attn.o_proj.bias", "attn_output.bias"),
    Name("attention.q_norm.scale", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    Name("attention.k_norm.scale", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    Name("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Name("mlp.router.weight", "mlp.gate.weight", "ffn_gate_inp.weight"),
    Name("mlp.gate.weight", "mlp.gate_proj.weight", "ffn_gate.weight"),
    Name("mlp.gate.bias", "mlp.gate_proj.bias", "ffn_gate.bias"),
    Name("mlp.up.weight", "mlp.up_proj.weight", "ffn_up.weight"),
    Name("mlp.up.bias", "mlp.up_proj.bias", "ffn_up.bias"),
    Name("mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight"),
    Name("mlp.down.bias", "mlp.down_proj.bias", "ffn_down.bias"),
)
EXPERT = tuple(
    Name(f"{EXPERTS}.{{}}.{name}.weight", f"mlp.experts.{{}}.{name}_proj.weight", f"ffn_{name}.{{}}.weight")
    for name in EXPERT_LINEARS
)
"""Of one expert, by its number."""
LAYER_PREFIX = {"hf": "model.layers.{}.", "gguf": "blk.{}."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter's values come from; `heads` is set when its rows are in llama.cpp's order."""

    tensor: RawTensor
    heads: int | None


def source_names(config: ModelConfig, format: Format) -> dict[str, Name]:
    """Names of every parameter by full path; the `hf` or `gguf` field asked for is a full name too."""
    shapes = parameter_shapes(config)
    names = {name.path: name for name in OUTER if name.path in shapes}
    for index in range(config.num_layers):
        prefix = LAYER_PREFIX[format].format(index)
        for name in (*LAYER, *_experts(config)):
            path = f"layers.{index}.{name.path}"
            if path in shapes:
                names[path] = dataclasses.replace(
                    name, **{"path": path, format: prefix + getattr(name, format)}
                )
    return names


def _experts(config: ModelConfig) -> list[Name]:
    count = 0 if config.mixture is None else config.mixture.num_experts
    return [
        Name(name.path.format(number), name.hf.format(number), name.gguf.format(number))
        for number in range(count)
        for name in EXPERT
    ]


def match_tensors(
    tensors: Iterable[RawTensor], config: ModelConfig, format: Format, *, where: str, permuted: bool = False
) -> dict[str, Source]:
    """Assign each tensor to the parameter it holds, by full path; each tensor and parameter exactly once.

    `permuted`: rows of the query and key projections are in llama.cpp's order, as in GGUF files of
    architecture `llama`.

    Raises:
        ValueError: lists every tensor that is unknown, missing, there twice or of the wrong shape; `where`
            heads the list.
    """
    shapes = parameter_shapes(config)
    names = source_names(config, format)
    paths = {_plain(getattr(name, format), format): path for path, name in names.items()}
    matched: dict[str, Source] = {}
    unknown, twice, misshapen = [], [], []
    for tensor in unstack(tensors, config, format):
        if _ignored(tensor.name, config, format):
            continue
        path = paths.get(_plain(tensor.name, format))
        if path is None:
            unknown.append(tensor.name)
        elif path in matched:
            twice.append(f"{tensor.name} and {matched[path].tensor.name}")
        else:
            field = names[path].heads
            heads = getattr(config, field) if permuted and field else None
            matched[path] = Source(tensor=tensor, heads=heads)
            if tensor.shape != shapes[path]:
                misshapen.append(f"{tensor.name} {list(tensor.shape)}, expected {list(shapes[path])}")
    missing = [
        f"{getattr(name, format)} {list(shapes[path])}" for path, name in names.items() if path not in matched
    ]
    groups = {"missing": missing, "unknown": unknown, "twice": twice, "wrong shape": misshapen}
    if any(groups.values()):
        raise ValueError(_mismatch(where, config, groups))
    return matched


def undo_permutation(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · d] from llama.cpp's interleaved rotary pairs back to Hugging Face's halves."""
    rows, rest = value.shape[0], value.shape[1:]
    return value.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _plain(name: str, format: Format) -> str:
    # A bare LlamaModel saves its tensors without the prefix that LlamaForCausalLM gives them.
    return name.removeprefix("model.") if format == "hf" else name


def _ignored(name: str, config: ModelConfig, format: Format) -> bool:
    if format == "gguf":
        return name == "rope_freqs.weight"  # the config carries it, as rope_scaling
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    return name.endswith("rotary_emb.inv_freq")  # follows from rope_theta


def _mismatch(where: str, config: ModelConfig, groups: Mapping[str, list[str]]) -> str:
    lines = [
        f"{where}: its tensors are not those of a {config.architecture} model of {config.num_layers} layers:"
    ]
    for title, entries in groups.items():
        if entries:
            more = f", ... and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
            lines.append(f"  {title} ({len(entries)}): {', '.join(entries[:LISTED])}{more}")
    lines.append("Is the config the one of these weights, and is every file there?")
    return "\n".join(lines)
