"""Which type llama.cpp gives each tensor under its named mixes.

Source: `llama_tensor_get_type_impl` in llama.cpp's src/llama-quant.cpp, for dense models whose queries, keys
and values are separate. Left out: its rules for mixtures of experts, for Falcon and for the type it calls 70B
(there, attn_v gets Q5_K instead of Q4_K), its fallback to blocks of 32 where 256 do not divide a row (rows
are padded instead: see `ggml.Quantizers`), and the embedding and output matrices.
"""

from typing import Literal, get_args

from benchmarks.quality.ggml import Kind
from svsk_jax.model.parameters import QUANTIZED_LINEARS

Mix = Literal["Q4_K_M", "Q4_K_S", "IQ4_XS"]
MIXES: tuple[Mix, ...] = get_args(Mix)
DEFAULTS: dict[Mix, Kind] = {"Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "IQ4_XS": "IQ4_XS"}
SHARED_HEADS = 4
"""From so many query heads per key head on, IQ4_XS spends more on attn_v."""


def uses_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers: the first and last eighth, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(mix: Mix, linear: str, layer: int, layers: int, *, importance: bool, gqa: int) -> Kind:
    """ggml's type for a decoder linear.

    - Q4_K_M: attn_v and ffn_down get Q6_K in the layers of `uses_more_bits`.
    - Q4_K_S: attn_v gets Q5_K in the first four layers, ffn_down in the first eighth of the layers.
    - IQ4_XS: attn_v gets Q5_K in every layer if at least four query heads share a key head; without an
      importance matrix, ffn_down gets Q5_K in the first eighth of the layers.
    - Everything else gets the mix's default: Q4_K, Q4_K, IQ4_XS.

    Args:
        mix: the mix.
        linear: path within the decoder layer, such as `attention.v`.
        layer: index of the decoder layer.
        layers: how many there are.
        importance: whether there is an importance matrix.
        gqa: query heads per key head.

    Raises:
        ValueError: unknown mix or linear, or no such layer.
    """
    if mix not in DEFAULTS:
        raise ValueError(f"unknown mix {mix!r}; known are {', '.join(MIXES)}")
    if linear not in QUANTIZED_LINEARS:
        raise ValueError(f"unknown linear {linear!r}; known are {', '.join(QUANTIZED_LINEARS)}")
    if not 0 <= layer < layers:
        raise ValueError(f"no layer {layer} among {layers}")
    value, down = linear == "attention.v", linear == "mlp.down"
    first_eighth = layer < layers // 8
    if mix == "Q4_K_M" and (value or down) and uses_more_bits(layer, layers):
        return "Q6_K"
    if mix == "Q4_K_S" and ((value and layer < 4) or (down and first_eighth)):
        return "Q5_K"
    if mix == "IQ4_XS" and ((value and gqa >= SHARED_HEADS) or (down and first_eighth and not importance)):
        return "Q5_K"
    return DEFAULTS[mix]
