"""Requests of many users in front of one or several `DreamMix` objects.

One worker thread a painter takes the requests in their order; each request has a `Ticket`. One more thread, the keeper,
sleeps until the next deadline. All state of a queue and its tickets changes under the one lock of its `Line`; no code
of the app runs under it. That code, `on_step`, runs in a worker's thread, where nothing of this package ever waits:
`submit`, `result` and `close` return at once there, so it cannot stop its own worker for ever.
"""

from dreammix_trt.engine.requests.queue import RequestQueue
from dreammix_trt.engine.requests.tally import Percentiles, Statistics
from dreammix_trt.engine.requests.tickets import StepCount, Ticket

__all__ = ["Percentiles", "RequestQueue", "Statistics", "StepCount", "Ticket"]
