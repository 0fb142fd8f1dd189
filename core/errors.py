"""Every error that a user can cause. Each has an exit code for the command line.

A message names the file, field or value, says what is wrong with it and what to do. The command line prints a
`DreamMixError` as one line on stderr and ends with its `exit_code`; `dreammix_trt.cli` does this in one place.
docs/command-line.md lists the codes.
"""

from __future__ import annotations


class DreamMixError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class InputError(DreamMixError):
    """Wrong use: a picture, mask, prompt, option or place that cannot be used."""

    exit_code = 2


class TooManyPixels(InputError):
    """A picture that is larger than allowed; it was not decoded."""


class FileFormatError(DreamMixError):
    """A file that is missing, truncated, of another format, or not meant for this base."""

    exit_code = 3


class EngineError(DreamMixError):
    """An engine directory that cannot be loaded: another schema, changed files, missing files, another platform."""

    exit_code = 4


class DeviceError(EngineError):
    """A device that cannot be used: no driver or an old one, another GPU than the engine's, a failed call.

    lost: whether the device's context is broken, so that nothing more can run in it.
    """

    exit_code = 5
    lost: bool = False


class OutOfMemoryError(DeviceError):
    """The device has too little memory left; the message has the memory plan. The runtime stays usable."""


class NotFiniteError(EngineError):
    """A network gave infinite values or NaN, also in float32 if the base has that network in float32.

    network: its name.
    """

    def __init__(self, message: str, network: str = "") -> None:
        super().__init__(message)
        self.network = network


class ProfileError(EngineError):
    """A request that is larger or smaller than every shape that a network was built for."""


class BuildError(DreamMixError):
    """A build that is impossible or failed its own checks."""

    exit_code = 6


class MissingExtraError(DreamMixError):
    """A package of an optional extra is not installed; the message names the extra to install."""

    exit_code = 7


class EndpointError(DreamMixError):
    """A model's endpoint that is down, refuses, or answers what cannot be used (EX_UNAVAILABLE of sysexits.h)."""

    exit_code = 69


class Cancelled(DreamMixError):
    """The caller stopped the work."""

    exit_code = 130


class QueueFull(DreamMixError):
    """The queue of requests is full: try again later (the exit code is EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class TimedOut(DreamMixError):
    """A request did not end in time (the exit code is that of timeout(1))."""

    exit_code = 124
