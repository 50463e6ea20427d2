"""Running a model: generation, sampling and chat."""

from svsk_jax.runtime.batch import generate_batch
from svsk_jax.runtime.chat import chat, encode_chat, encode_prompt, stop_ids
from svsk_jax.runtime.generate import GenerationResult, TextGenerator, TextStream
from svsk_jax.runtime.sampling import SamplingConfig, sample

__all__ = [
    "GenerationResult",
    "SamplingConfig",
    "TextGenerator",
    "TextStream",
    "chat",
    "encode_chat",
    "encode_prompt",
    "generate_batch",
    "sample",
    "stop_ids",
]
