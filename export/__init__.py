"""Weights to ONNX: graph export, weight files, the parity check against torch, and torch as a back end."""
