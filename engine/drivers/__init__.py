"""Devices: memory, streams, copies, kernels and graphs; CUDA's, and a simulated one on the host."""
