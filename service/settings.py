"""What an operator decides once: who may come in, how much anybody may send, how long results stay."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from dreammix_trt.core.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and manners of a service. Raises InputError for another host than this computer without a key.

    host, port: where it listens.
    api_key: what clients must know; "": nobody is asked.
    insecure: whether other computers may come in without a key.
    body_bytes: the largest body of a request; subject_bytes: of one that brings a subject.
    bodies_bytes: the most bytes of bodies that are being read, all clients together.
    body_seconds: how long a client may take to send one, or take nothing of an answer.
    head_seconds: how long a connection may take to send a request's headers.
    fields: the most parts of a form; field_bytes: the longest text among them.
    pixels: of the largest picture, as its header says.
    pictures: the most of one request.
    keep_results, keep_bytes, keep_seconds: how many finished jobs stay, the bytes of their pictures, and for how long.
    most_subjects: how many subjects an engine may have before uploads are refused.
    watchers: how many clients may follow one job's events.
    log_prompts: whether the log shows what is asked for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    insecure: bool = False
    body_bytes: int = 32 * MIB
    subject_bytes: int = 256 * MIB
    bodies_bytes: int = 512 * MIB
    body_seconds: float = 60.0
    head_seconds: float = 15.0
    fields: int = 64
    field_bytes: int = 64 << 10
    pixels: int = 4096 * 4096
    pictures: int = 16
    keep_results: int = 64
    keep_bytes: int = 512 * MIB
    keep_seconds: float = 3600.0
    most_subjects: int = 64
    watchers: int = 16
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.api_key and (not self.api_key.isascii() or not self.api_key.isprintable() or " " in self.api_key):
            raise InputError("the API key has characters that no HTTP header holds: take letters, digits and signs")
        if not self.is_private and not self.api_key and not self.insecure:
            raise InputError(
                f"--host {self.host} lets other computers in, and there is no key: give --api-key (or "
                "DREAMMIX_API_KEY), or say --insecure"
            )

    @property
    def is_private(self) -> bool:
        """Whether only this computer can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this computer's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
