"""How a picture was made, kept inside it: the request, what painted it, and the text that A1111 writes and others show.

A PNG has text chunks: "dreammix" (the request as JSON), "dreammix_origin", "parameters" (A1111's) and "Software". JPEG
and WebP have EXIF fields, which join those of the user's picture: UserComment with A1111's text, where that program has
it, XPComment with the JSON of both of ours, and Software.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from dreammix_trt.core.request import Request

_REQUEST, _ORIGIN, _PARAMETERS, _SOFTWARE = "dreammix", "dreammix_origin", "parameters", "Software"
_UNICODE = b"UNICODE\x00"  # EXIF's mark of UTF-16 in a UserComment
_SAMPLERS = {
    "dpmpp_2m_sde": {"Sampler": "DPM++ 2M SDE", "Schedule type": "Karras"},
    "euler": {"Sampler": "Euler"},
    "lcm": {"Sampler": "LCM"},
}
_LARGEST = 65533  # bytes of EXIF in a JPEG


def find_version() -> str:
    """The version of this product, "" where it is not installed as a package."""
    try:
        return version("dreammix-trt")
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Origin:
    """What painted a picture.

    version: of dreammix-trt.
    base: name of the base.
    base_key: names its weights, as in the passport.
    subject: name of the subject, "" for none.
    subject_sha256: of the LoRA file that it was made of, or of its photographs.
    token_subject: name of the subject whose tokens stood beside the text, "" for none.
    """

    version: str = ""
    base: str = ""
    base_key: str = ""
    subject: str = ""
    subject_sha256: str = ""
    token_subject: str = ""


@dataclass(frozen=True)
class Imprint:
    """What one picture says about itself.

    request: makes exactly this picture.
    """

    request: Request
    origin: Origin

    def make_options(self, image: Image.Image, kind: str) -> dict[str, Any]:
        """The options of `image.save` that write it into a picture.

        kind: "PNG", "JPEG" or "WEBP".
        """
        if kind != "PNG":
            return {"exif": self._join_exif(image, kind)}
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(_REQUEST, self.request.to_json())
        chunks.add_itxt(_ORIGIN, json.dumps(asdict(self.origin), ensure_ascii=False))
        chunks.add_itxt(_PARAMETERS, spell_parameters(self.request, self.origin, image.size))
        chunks.add_text(_SOFTWARE, self._software)
        return {"pnginfo": chunks}

    @property
    def _software(self) -> str:
        return f"dreammix-trt {self.origin.version}".strip()

    def _join_exif(self, image: Image.Image, kind: str) -> bytes:
        """The EXIF block of the picture that was repainted, joined with ours. JPEG has room for 64 KiB."""
        given = image.info.get("exif", b"")
        found = self._make_exif(given, image.size)
        if kind == "JPEG" and len(found) > _LARGEST and given:
            logging.getLogger(__name__).warning("a JPEG holds 64 KiB of EXIF: that of the input is left out")
            found = self._make_exif(b"", image.size)
        if kind == "JPEG" and len(found) > _LARGEST:
            logging.getLogger(__name__).warning("a JPEG holds 64 KiB of EXIF: the request is left out; .png holds it")
            return b""
        return found

    def _make_exif(self, given: bytes, size: tuple[int, int]) -> bytes:
        exif = Image.Exif()
        exif.load(given)
        ours = {_REQUEST: json.loads(self.request.to_json()), _ORIGIN: asdict(self.origin)}
        exif[ExifTags.Base.Software] = self._software
        exif[ExifTags.Base.XPComment] = (json.dumps(ours, ensure_ascii=False) + "\x00").encode("utf-16-le")
        text = spell_parameters(self.request, self.origin, size)
        details = dict(exif.get_ifd(ExifTags.IFD.Exif)) | {
            ExifTags.Base.UserComment: _UNICODE + text.encode("utf-16-be")
        }
        details.pop(ExifTags.IFD.Interop, None)  # an offset into the old block
        # Pillow takes bytes for numbers; these fields are of EXIF's type "undefined", as which it writes a bytearray.
        exif[ExifTags.IFD.Exif] = {
            tag: [bytearray(value)] if isinstance(value, bytes) else value for tag, value in details.items()
        }
        return exif.tobytes()


def find_request(image: Image.Image) -> str | None:
    """The request that a picture carries, as JSON; None where there is none."""
    text = image.info.get(_REQUEST)
    if isinstance(text, str):
        return text
    comment = image.getexif().get(ExifTags.Base.XPComment)
    if not isinstance(comment, bytes):
        return None
    try:
        found = json.loads(comment.decode("utf-16-le").rstrip("\x00"))
    except (ValueError, RecursionError):
        return None
    return json.dumps(found[_REQUEST]) if isinstance(found, dict) and _REQUEST in found else None


def spell_parameters(request: Request, origin: Origin, size: tuple[int, int]) -> str:
    """A request as AUTOMATIC1111's web UI writes it (modules/infotext_utils.py there reads it).

    size: (width, height) of the picture.
    """
    settings: dict[str, object] = {
        "Steps": request.num_inference_steps,
        **_SAMPLERS[request.sampler],
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Denoising strength": f"{request.strength:g}",
        "Model": origin.base,
        "Base hash": origin.base_key[:16],
        "Subject": origin.subject,
        "Subject hash": origin.subject_sha256[:16],
        "Subject scale": f"{request.subject_scale:g}" if origin.subject else "",
        "Token subject": origin.token_subject,
        "Tokens": request.token_count if origin.token_subject else "",
        "Token weight": f"{request.token_weight:g}" if origin.token_subject else "",
        "Version": f"dreammix-trt {origin.version}".strip(),
    }
    line = ", ".join(f"{name}: {_quote(str(value))}" for name, value in settings.items() if value != "")
    negative = [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
    return "\n".join([request.prompt, *negative, line])


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text
