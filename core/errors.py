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


class DeviceError(EngineError):
    """A device that cannot be used: no driver, one too old, another GPU than the engine's, a failed call.

    lost: True where nothing more can run in this device's context, whatever is asked of it.
    """

    lost: bool = False


class OutOfMemoryError(DeviceError):
    """The device has too little memory left; the message has the memory plan. The runtime stays usable."""


class NotFiniteError(EngineError):
    """A network gave values that are not numbers, in float32 too where the base has that. network: its name."""

    def __init__(self, message: str, network: str = "") -> None:
        super().__init__(message)
        self.network = network


class ProfileError(EngineError):
    """A request larger, or smaller, than any shape a network was built for."""


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
