"""Requests of many users in front of one or several `DreamMix` objects.

One worker thread per painter takes the requests in their order. Each request has a `Ticket`. One more thread, the
keeper, sleeps until the next deadline. All state of a queue and its tickets changes under the lock of its `Line`; the
app's code never runs under it. The app's callback `on_step` runs in a worker's thread, where nothing of this package
waits: `submit`, `result` and `close` return at once there, and `visit` raises, so a callback cannot block its own
worker forever.
"""

from dreammix_trt.engine.requests.queue import RequestQueue
from dreammix_trt.engine.requests.tally import Percentiles, Statistics
from dreammix_trt.engine.requests.tickets import StepCount, Ticket

__all__ = ["Percentiles", "RequestQueue", "Statistics", "StepCount", "Ticket"]
