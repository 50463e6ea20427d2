"""Kernels over packed weights: arrays in, arrays out."""
