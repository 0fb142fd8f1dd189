"""A multipart form (RFC 7578) as parts in memory. No part ever becomes a file, whatever a client calls it."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dreammix_trt.service.refusals import Refusal

LONGEST_NAME = 256  # bytes of a part's name
_LONGEST_HEADER = 8192  # bytes of a part's headers


@dataclass
class Part:
    """One part. is_file: whether its client gave it a file's name, which is not kept."""

    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


class FormReader:
    """Takes a body piece by piece. Every fault is a Refusal.

    content_type: the header, with the boundary.
    most_parts: how many there may be; most_text: the bytes of one that is not a file.
    """

    def __init__(self, content_type: str, most_parts: int, most_text: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise Refusal("invalid_request", "the body must be a form: multipart/form-data with its boundary")
        self.parts: list[Part] = []
        self._most_parts, self._most_text = most_parts, most_text
        self._header, self._value, self._place, self._size, self._ended = b"", b"", b"", 0, False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_part_data": self._take_data,
                    "on_header_field": self._take_header,
                    "on_header_value": self._take_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._name,
                    "on_end": self._end,
                },
            )
        except (FormParserError, ValueError) as error:
            raise _broken(error) from None

    def write(self, data: bytes) -> None:
        """Take the next piece of the body."""
        try:
            self._parser.write(data)
        except (FormParserError, ValueError) as error:
            raise _broken(error) from None

    def finish(self) -> list[Part]:
        """The parts, after the last piece."""
        if not self._ended:
            raise Refusal("invalid_request", "the form ends before its last boundary: send it whole")
        return self.parts

    def _begin(self) -> None:
        if len(self.parts) >= self._most_parts:
            raise Refusal("too_large", f"the form has more than {self._most_parts} parts, which is the limit here")
        self.parts.append(Part())
        self._header, self._value, self._place, self._size = b"", b"", b"", 0

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += self._count(data[start:end])

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._count(data[start:end])

    def _count(self, data: bytes) -> bytes:
        self._size += len(data)
        if self._size > _LONGEST_HEADER:
            raise Refusal("too_large", f"the form: a part's headers have more than {_LONGEST_HEADER} bytes")
        return data

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._place = self._value
        self._header = self._value = b""

    def _name(self) -> None:
        _, options = parse_options_header(self._place)
        name = options.get(b"name")
        if name is None:
            raise Refusal("invalid_request", "the form has a part without a name")
        if len(name) > LONGEST_NAME:
            raise Refusal("too_large", f"the form: a part's name has more than {LONGEST_NAME} bytes")
        self.parts[-1].name = name.decode(errors="backslashreplace")
        self.parts[-1].is_file = b"filename" in options

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.data += data[start:end]
        if not part.is_file and len(part.data) > self._most_text:
            raise Refusal(
                "too_large", f"the form: a text has more than {self._most_text} bytes, which is the limit here"
            )

    def _end(self) -> None:
        self._ended = True


def _broken(error: Exception) -> Refusal:
    return Refusal("invalid_request", f"the form cannot be read: {error}")
