"""The runtime on an NVIDIA GPU: a whole request on the device, as replayed graphs (docs/architecture.md)."""
