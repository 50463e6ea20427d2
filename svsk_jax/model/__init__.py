"""The decoder and the names and shapes of its parameters."""

from svsk_jax.model.config import ModelConfig, RopeScaling
from svsk_jax.model.decoder import Decoder, DecoderLayer
from svsk_jax.model.kv_cache import KVCache

__all__ = ["Decoder", "DecoderLayer", "KVCache", "ModelConfig", "RopeScaling"]
