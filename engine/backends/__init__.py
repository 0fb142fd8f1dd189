"""What runs networks: ONNX Runtime and TensorRT."""
