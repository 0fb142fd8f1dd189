"""Protocols and metrics: what an engine paints is measured, reported and shown (`dreammix-trt eval`)."""
