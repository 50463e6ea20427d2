"""The decoder and the names and shapes of its parameters."""

from svsk_jax.model.config import Mixture, ModelConfig, RopeScaling
from svsk_jax.model.decoder import Decoder, DecoderLayer
from svsk_jax.model.kv_cache import KVCache

__all__ = ["Decoder", "DecoderLayer", "KVCache", "Mixture", "ModelConfig", "RopeScaling"]
