"""The back ends that run networks: ONNX Runtime and TensorRT."""
