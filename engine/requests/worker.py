"""A worker: it paints the requests of a line one after the other, with its own painter."""

from __future__ import annotations

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.engine.requests.errands import Errand, Paints
from dreammix_trt.engine.requests.line import Line
from dreammix_trt.engine.requests.tickets import StepCount, Ticket
from dreammix_trt.engine.result import Result


def work(line: Line, painter: Paints) -> DeviceError | None:
    """Serve until the line is closed and empty, or the device is lost.

    Returns the error that reports the loss, else None.
    """
    lost: DeviceError | None = None
    while lost is None and (task := line.take(painter)) is not None:
        lost = task.run() if isinstance(task, Errand) else _serve(line, painter, task)
        del task  # nothing of a request is kept while waiting for the next
    return lost


def _serve(line: Line, painter: Paints, ticket: Ticket) -> DeviceError | None:
    """Serve one request; its result or error goes to its ticket. Returns the error when the device is lost."""
    result: Result | None = None
    error: BaseException | None = None
    try:
        result = _paint(line, painter, ticket)
    except BaseException as caught:
        error = caught
    line.finish(ticket, result, error)
    try:
        return error if isinstance(error, DeviceError) and error.lost else None
    finally:
        del error, ticket  # or its traceback keeps both


def _paint(line: Line, painter: Paints, ticket: Ticket) -> Result | None:
    """Take the steps of a request. None when it stopped before the last one."""
    order, result = ticket._order, None
    try:
        if order is None:  # its deadline has just passed
            return None
        events = painter.iterate(
            order.image, order.mask_image, order.request, noise=order.noise, keep_stages=order.keep_stages
        )
        try:
            line.follow(ticket, getattr(events, "stop", None))
            for event in events:
                ticket._steps = StepCount(event.index + 1, event.total)
                if order.on_step is not None and not ticket._must_stop():
                    order.on_step(event)
                result = event.result or result
                if ticket._must_stop():
                    break
        finally:
            line.follow(ticket, None)
            getattr(events, "close", lambda: None)()  # a generator; leaving it stops the work
        return result
    finally:
        del ticket  # as in Ticket.result
