"""Requests on the host: numpy, the C++ kernels, and networks that take and return arrays."""
