"""Subjects of tokens on a device: not yet."""

from __future__ import annotations

from typing import NoReturn

from dreammix_trt.core.errors import InputError


def refuse_tokens(what: str) -> NoReturn:
    """Raise InputError: neither enrolling nor painting with tokens is done on a device."""
    raise InputError(f"{what}, but subjects of tokens are made and painted on the CPU only: load with device='cpu'")
