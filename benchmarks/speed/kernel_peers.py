"""Other 4-bit matrix products that the machine has, as calls to time."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from pallas_kernels.device_time import Chain
from pallas_kernels.svsk_matmul.search import LAUNCHES, copies_of

GROUP = 128


def torch_chain(function: Callable[..., Any], operands: list[tuple[Any, ...]]) -> Chain:
    """As `device_time.chain`, of torch."""
    import torch

    length = max(LAUNCHES, len(operands))

    def run() -> None:
        with torch.inference_mode():
            for index in range(length):
                function(*operands[index % len(operands)])
        torch.cuda.synchronize()

    return Chain(run, length)


def peer_chains(n: int, k: int, m: int) -> dict[str, Chain]:
    """Products of m rows of x with an [n, k] weight in 4 bits, groups of 128, by what is installed."""
    calls: dict[str, Chain] = {}
    if importlib.util.find_spec("torch") is None:
        return calls
    import torch

    if not torch.cuda.is_available():
        return calls
    count = copies_of(n * k // 2)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [_tinygemm_weight(n, k) for _ in range(count)]
    calls["tinygemm"] = torch_chain(
        lambda weight, scales: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales), weights
    )
    if importlib.util.find_spec("bitsandbytes") is not None:
        bnb = importlib.import_module("bitsandbytes")
        quantized = [
            bnb.functional.quantize_4bit(
                torch.randn(n, k, dtype=torch.bfloat16, device="cuda"), blocksize=64, quant_type="nf4"
            )
            for _ in range(count)
        ]
        calls["bitsandbytes nf4"] = torch_chain(
            lambda weight, state: bnb.matmul_4bit(x, weight.t(), quant_state=state), quantized
        )
    if importlib.util.find_spec("gemlite") is not None:
        calls["gemlite"] = torch_chain(lambda layer: layer(x), _gemlite_layers(n, k, count))
    return calls


def _tinygemm_weight(n: int, k: int) -> tuple[Any, Any]:
    import torch

    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return packed, scales


def _gemlite_layers(n: int, k: int, count: int) -> list[tuple[Any]]:
    import torch

    gemlite = importlib.import_module("gemlite")
    layers = []
    for _ in range(count):
        layer = gemlite.GemLiteLinear(
            4,
            group_size=GROUP,
            in_features=k,
            out_features=n,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(n, k // GROUP, dtype=torch.bfloat16, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, 8.0), bias=None)
        layers.append((layer,))
    return layers
