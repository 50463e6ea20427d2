"""The kernels between the products of a decode step: each finishes a product and writes what the next one
reads."""

from pallas_kernels.decode_step.attention import MOST_QUERIES, attend
from pallas_kernels.decode_step.exchange import LARGEST as LARGEST_EXCHANGE
from pallas_kernels.decode_step.exchange import Boxes
from pallas_kernels.decode_step.gated import finish_gated
from pallas_kernels.decode_step.heads import HEAD_DIMS
from pallas_kernels.decode_step.likeliest import LOST, likeliest_over
from pallas_kernels.decode_step.mixture import choose_experts, finish_weighed
from pallas_kernels.decode_step.product import Product, product
from pallas_kernels.decode_step.residual import Residual, finish_residual, why_no_exchange

__all__ = [
    "HEAD_DIMS",
    "LARGEST_EXCHANGE",
    "LOST",
    "MOST_QUERIES",
    "Boxes",
    "Product",
    "Residual",
    "attend",
    "choose_experts",
    "finish_gated",
    "finish_residual",
    "finish_weighed",
    "likeliest_over",
    "product",
    "why_no_exchange",
]
