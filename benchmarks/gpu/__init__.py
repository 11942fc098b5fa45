"""Benchmarks that need a GPU; each refuses to start without one."""
