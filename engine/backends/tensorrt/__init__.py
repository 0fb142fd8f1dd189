"""TensorRT-RTX and TensorRT: building plans ahead of time, and running them."""
