"""Weights to ONNX: the list of networks, graph export, weight files and the parity check against torch."""
