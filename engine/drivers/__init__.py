"""Devices: memory, streams, copies, kernels and graphs; of CUDA, and simulated on the host."""
