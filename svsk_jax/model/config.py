"""Shape and arithmetic of a decoder, read from and written to Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
HF_CLASSES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies differ from `theta ** (-2 i / head_dim)`.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones by `factor`, keeps the high
    ones and
    interpolates between (Llama 3.1, `rope_type: llama3`). `factors` divides frequency i by `factors[i]`: the
    form in which a GGUF file stores the outcome of llama3 scaling.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Experts in place of an MLP: each token goes to the `num_experts_per_tok` whose router probability is
    largest, and their outputs are summed with these probabilities as weights.

    Invariants, checked on construction: every number is positive, and no more experts are asked for than
    there are.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Hidden units of one expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token are scaled to a sum of 1."""
    decoder_sparse_step: int = 1
    """Layers step - 1, 2 step - 1, ... have experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers that have a dense MLP all the same."""

    def __post_init__(self):
        for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            if getattr(self, field) <= 0:
                raise ValueError(f"config.json: {field} must be positive, got {getattr(self, field)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} is more than the "
                f"{self.num_experts} experts"
            )

    def has_experts(self, index: int) -> bool:
        """Whether decoder layer `index` has experts."""
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with RMSNorm, rotary attention with grouped KV heads, and a SiLU-gated MLP or a
    mixture of such experts.

    Invariants, checked on construction: `num_heads` is a multiple of `num_kv_heads`, `head_dim` is even,
    every size is positive.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    mixture: Mixture | None = None
    """The experts of the layers that have some; None where all are dense."""

    def __post_init__(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, field) <= 0:
                raise ValueError(f"config.json: {field} must be positive, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim must be even for rotary embeddings, got {self.head_dim}")

    def has_experts(self, index: int) -> bool:
        """Whether decoder layer `index` has a mixture of experts for its MLP."""
        return self.mixture is not None and self.mixture.has_experts(index)

    @property
    def inverse_frequencies(self) -> np.ndarray:
        """Rotary frequencies in radians per position, f32 [head_dim / 2], after scaling."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        scaling = self.rope_scaling
        if scaling is None:
            pass
        elif scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "factors":
            frequencies = frequencies / np.asarray(scaling.factors)
        else:
            turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
        return frequencies.astype(np.float32)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json (the layouts of transformers 4 and 5).

        Raises:
            ValueError: unknown architecture or activation, or a missing key; names it and lists what is
            known.
            NotImplementedError: a variant of a known architecture that the decoder lacks.
        """
        names = config.get("architectures") or []
        architecture: Architecture | None = next(
            (HF_CLASSES[name] for name in names if name in HF_CLASSES), None
        )
        if architecture is None and not names:
            known = HF_CLASSES.values()
            architecture = next((name for name in known if name == config.get("model_type")), None)
        if architecture is None:
            raise ValueError(
                f"config.json: unknown architecture {', '.join(names) or config.get('model_type')!r}; "
                f"known are {', '.join(HF_CLASSES)}"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act must be 'silu', got {activation!r}")
        missing = [
            key
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if not isinstance(config.get(key), int)
        ]
        if missing:
            raise ValueError(
                f"config.json: expected integers under {', '.join(missing)}; is the file complete?"
            )
        if architecture.startswith("qwen") and config.get("use_sliding_window"):
            raise NotImplementedError("config.json: use_sliding_window=true is not supported for Qwen models")
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        rope = config.get("rope_parameters") or {}
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim")
            or (128 if architecture == "qwen3" else config["hidden_size"] // heads),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope_scaling=_rope_scaling(rope or config.get("rope_scaling")),
            qk_norm=architecture in ("qwen3", "qwen3_moe"),
            qkv_bias=bias or architecture == "qwen2",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=config.get("sliding_window") if architecture == "mistral" else None,
            mixture=_mixture(config) if architecture == "qwen3_moe" else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers (4 and 5) builds the same model from.

        Raises:
            NotImplementedError: rotary `factors` have no name in transformers.
        """
        hf_class = next(
            name for name, architecture in HF_CLASSES.items() if architecture == self.architecture
        )
        config: dict[str, Any] = {
            "architectures": [hf_class],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.architecture in ("llama", "qwen3", "qwen3_moe"):
            config["attention_bias"] = self.o_bias
        if self.architecture == "llama":
            config["mlp_bias"] = self.mlp_bias
        if self.architecture == "mistral":
            config["sliding_window"] = self.sliding_window
        if self.mixture is not None:
            config |= dataclasses.asdict(self.mixture)
            config["mlp_only_layers"] = list(self.mixture.mlp_only_layers)
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        elif scaling is not None and scaling.kind == "llama3":
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        elif scaling is not None:
            raise NotImplementedError(
                "transformers has no rope_type for the per-frequency factors of this GGUF file; convert "
                "from the "
                "original safetensors instead"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain data for our own metadata; `from_dict` restores it exactly. Dense models have no `mixture`
        there: fingerprints of what was measured before there were mixtures stay valid."""
        data = dataclasses.asdict(self)
        if self.mixture is None:
            del data["mixture"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`, also after a trip through JSON."""
        fields = dict(data)
        if fields.get("rope_scaling") is not None:
            scaling = dict(fields["rope_scaling"])
            scaling["factors"] = tuple(scaling.get("factors", ()))
            fields["rope_scaling"] = RopeScaling(**scaling)
        if fields.get("mixture") is not None:
            mixture = dict(fields["mixture"])
            mixture["mlp_only_layers"] = tuple(mixture.get("mlp_only_layers", ()))
            fields["mixture"] = Mixture(**mixture)
        return cls(**fields)


def _mixture(config: Mapping[str, Any]) -> Mixture:
    # transformers 5 writes the number of experts under another name.
    counts = [config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    sizes: dict[str, Any] = {
        "num_experts": counts[0] if counts else None,
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "moe_intermediate_size": config.get("moe_intermediate_size"),
    }
    missing = [key for key, size in sizes.items() if not isinstance(size, int)]
    if missing:
        raise ValueError(f"config.json: expected integers under {', '.join(missing)}; is the file complete?")
    return Mixture(
        **sizes,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        decoder_sparse_step=config.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(config.get("mlp_only_layers") or ()),
    )


def _rope_scaling(scaling: Mapping[str, Any] | None) -> RopeScaling | None:
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        )
    raise NotImplementedError(
        f"config.json: rope scaling {kind!r} is not supported; known are default, linear, llama3"
    )
