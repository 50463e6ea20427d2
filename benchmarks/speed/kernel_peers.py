"""Other 4-bit matrix products that the machine has, as calls to time."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

Call = Callable[[int], Any]
GROUP = 128


class TorchCall:
    """A torch call whose result is waited for."""

    def __init__(self, function: Callable[..., Any], operands: list[tuple[Any, ...]]):
        self.function, self.operands = function, operands

    def __call__(self, index: int) -> None:
        """Run on the operands of a launch."""
        import torch

        with torch.inference_mode():
            self.function(*self.operands[index % len(self.operands)])
        torch.cuda.synchronize()


def peer_calls(n: int, k: int, m: int, working_set: int) -> dict[str, Call]:
    """Products of m rows of x with an [n, k] weight in 4 bits, groups of 128, by what is installed."""
    calls: dict[str, Call] = {}
    if importlib.util.find_spec("torch") is None:
        return calls
    import torch

    if not torch.cuda.is_available():
        return calls
    count = min(24, 1 + working_set // (n * k // 2))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [_tinygemm_weight(n, k) for _ in range(count)]
    calls["tinygemm"] = TorchCall(
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
        calls["bitsandbytes nf4"] = TorchCall(
            lambda weight, state: bnb.matmul_4bit(x, weight.t(), quant_state=state), quantized
        )
    if importlib.util.find_spec("gemlite") is not None:
        calls["gemlite"] = _gemlite_call(n, k, x, count)
    return calls


def _tinygemm_weight(n: int, k: int) -> tuple[Any, Any]:
    import torch

    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return packed, scales


def _gemlite_call(n: int, k: int, x: Any, count: int) -> Call:
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
    return TorchCall(lambda layer: layer(x), layers)
