"""Calibration: text, and the second moments of the linears' inputs on it."""
