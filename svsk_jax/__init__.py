"""Quantize large language models to about 4.5 bits per weight, and run them, in JAX."""
