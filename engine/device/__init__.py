"""Requests on a device, from upload to finished pictures."""
