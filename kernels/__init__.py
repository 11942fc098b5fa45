"""Numeric kernels: arrays in, arrays out, no files and no state."""
