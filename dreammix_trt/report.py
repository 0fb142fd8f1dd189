"""Pictures about pictures: contact sheets, stage sheets, and the demo's HTML report."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from dreammix_trt.engine.result import Result

_PAPER, _INK, _FAINT = (252, 251, 248), (28, 28, 32), (110, 110, 118)
_GAP = 12


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet and the line under it."""

    image: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a sheet: a heading and its tiles."""

    title: str
    tiles: Sequence[Tile]


def contact_sheet(rows: Sequence[Row], *, tile: int = 208, title: str = "") -> Image.Image:
    """Lay rows of tiles out on one RGB picture.

    `tile` is the side in pixels of the square that every picture is fitted into, aspect kept.
    """
    heading, small = ImageFont.load_default(17), ImageFont.load_default(13)
    columns = max(len(row.tiles) for row in rows)
    width = _GAP + columns * (tile + _GAP)
    caption_lines = [max((_lines(t.caption, small, tile) for t in row.tiles), key=len, default=[]) for row in rows]
    heights = [30 + tile + 17 * len(lines) + _GAP for lines in caption_lines]
    top = 46 if title else _GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_GAP, 12), title, fill=_INK, font=ImageFont.load_default(22))
    y = top
    for row, height in zip(rows, heights, strict=True):
        draw.text((_GAP, y + 4), row.title, fill=_INK, font=heading)
        for column, item in enumerate(row.tiles):
            x = _GAP + column * (tile + _GAP)
            fitted = _fit(item.image, tile)
            sheet.paste(fitted, (x + (tile - fitted.width) // 2, y + 30 + (tile - fitted.height) // 2))
            for number, line in enumerate(_lines(item.caption, small, tile)):
                draw.text((x, y + 32 + tile + 17 * number), line, fill=_FAINT, font=small)
        y += height
    return sheet


def marked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with its marked region veiled and outlined, to show what a user would have drawn."""
    from PIL import ImageFilter

    region = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
    veil = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (255, 0, 120)), 0.35)
    out = Image.composite(veil, image.convert("RGB"), region)
    edge = region.filter(ImageFilter.MaxFilter(3))
    edge.paste(0, mask=region)
    out.paste((255, 0, 120), mask=edge)
    return out


def stage_sheet(result: Result) -> Image.Image:
    """One row: what each stage of a request did (needs a result made with `keep_stages`)."""
    tiles = [Tile(picture, name.replace("_", " ")) for name, picture in result.stages.items()]
    tiles.append(Tile(result.images[0], "result"))
    return contact_sheet([Row(result.request.prompt or "(no prompt)", tiles)])


def html_report(title: str, sheet: Image.Image, tables: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A page that stands alone: the sheet and tables of text, the first row of each being its head."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<img alt="contact sheet" src="{_data_uri(sheet)}">']
    for name, rows in tables:
        parts.append(f"<h2>{html.escape(name)}</h2><table>")
        for number, row in enumerate(rows):
            cell = "th" if number == 0 else "td"
            parts.append("<tr>" + "".join(f"<{cell}>{html.escape(str(text))}</{cell}>" for text in row) + "</tr>")
        parts.append("</table>")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c20; background: #fcfbf8; max-width: 1160px;
  margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; border: 1px solid #ddd }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e2dc; vertical-align: top;
  overflow-wrap: anywhere }}
</style></head><body>
{body}
</body></html>
"""
