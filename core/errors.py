"""Every error a user can cause, each with its remedy in the message and an exit code for the command line.

An error message names the file, field or value, says what is wrong with it and what to do. The command line
turns a `DreamMixError` into one line on stderr and `exit_code`, in one place (`dreammix_trt.cli`).
"""

from __future__ import annotations


class DreamMixError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2


class InputError(DreamMixError):
    """A picture, mask, prompt or parameter that cannot be used."""


class FileFormatError(DreamMixError):
    """A file that is missing, truncated, of another format, or not meant for this base."""


class EngineError(DreamMixError):
    """An engine directory that cannot be loaded: other schema, tampered, incomplete, other platform."""


class BuildError(DreamMixError):
    """A build that cannot be carried out or that failed its own checks."""


class MissingExtraError(DreamMixError):
    """A package of an optional extra is not installed; the message names the extra to install."""


class Cancelled(DreamMixError):
    """The caller stopped the work."""

    exit_code = 130


class QueueFull(DreamMixError):
    """As many requests wait as the queue takes: try again later (sysexits.h calls this EX_TEMPFAIL)."""

    exit_code = 75


class TimedOut(DreamMixError):
    """A request had not ended when its time was over (the exit code is that of timeout(1))."""

    exit_code = 124
