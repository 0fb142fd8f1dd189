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
class Figure:
    """One picture of a sheet and the line under it."""

    image: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a sheet: a heading, its tiles, and a sentence below them that says what to look for."""

    title: str
    tiles: Sequence[Figure]
    note: str = ""


def contact_sheet(rows: Sequence[Row], *, tile: int = 256, title: str = "") -> Image.Image:
    """Lay rows of tiles out on one RGB picture, as wide as the longest row.

    `tile` is the side in pixels of the square that a picture of the longest row is fitted into, aspect kept; shorter
    rows get larger tiles, at most twice as wide.
    """
    columns = max(len(row.tiles) for row in rows)
    width = _GAP + columns * (tile + _GAP)
    strips = [_row_strip(row, width, min(2 * tile + _GAP, (width - _GAP) // len(row.tiles) - _GAP)) for row in rows]
    top = 46 if title else _GAP
    sheet = Image.new("RGB", (width, top + sum(strip.height for strip in strips) + _GAP), _PAPER)
    if title:
        ImageDraw.Draw(sheet).text((_GAP, 12), title, fill=_INK, font=ImageFont.load_default(22))
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _row_strip(row: Row, width: int, tile: int) -> Image.Image:
    """A row as a picture of its own: heading, tiles, their captions, note."""
    heading, small = ImageFont.load_default(18), ImageFont.load_default(14)
    pictures = [_fit(item.image, tile) for item in row.tiles]
    captions = [_break_lines(item.caption, small, tile) for item in row.tiles]
    note = _break_lines(row.note, small, width - 2 * _GAP)
    high, deep = max(picture.height for picture in pictures), max(len(lines) for lines in captions)
    strip = Image.new("RGB", (width, 32 + high + 18 * (deep + len(note)) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, 4), row.title, fill=_INK, font=heading)
    for column, (picture, lines) in enumerate(zip(pictures, captions, strict=True)):
        x = _GAP + column * (tile + _GAP)
        strip.paste(picture, (x, 32))
        for number, line in enumerate(lines):
            draw.text((x, 34 + high + 18 * number), line, fill=_FAINT, font=small)
    for number, line in enumerate(note):
        draw.text((_GAP, 38 + high + 18 * (deep + number)), line, fill=_INK, font=small)
    return strip


def mark_region(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with its marked region veiled and outlined, to show what a user would have drawn."""
    from PIL import ImageFilter

    region = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
    veil = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (255, 0, 120)), 0.35)
    out = Image.composite(veil, image.convert("RGB"), region)
    edge = region.filter(ImageFilter.MaxFilter(3))
    edge.paste(0, mask=region)
    out.paste((255, 0, 120), mask=edge)
    return out


def enlarge_region(image: Image.Image, mask: Image.Image, margin: float = 0.35) -> Image.Image:
    """The square around the marked region, `margin` larger on each side; it never leaves the picture."""
    left, top, right, bottom = mask.convert("L").point(lambda value: 255 if value > 127 else 0).getbbox() or (
        0,
        0,
        *image.size,
    )
    side = min(round(max(right - left, bottom - top) * (1 + 2 * margin)), *image.size)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    x, y = min(max(x, 0), image.width - side), min(max(y, 0), image.height - side)
    return image.convert("RGB").crop((x, y, x + side, y + side))


def enlarge_border(image: Image.Image, mask: Image.Image, share: float = 0.25) -> Image.Image:
    """A square around the rightmost pixel of the marked region's upper half; its side is `share` of the short side."""
    region = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
    _, top, _, bottom = region.getbbox() or (0, 0, *image.size)
    upper = region.crop((0, top, image.width, (top + bottom + 1) // 2))
    right = (upper.getbbox() or (0, 0, image.width, 0))[2]
    column = upper.crop((right - 1, 0, right, upper.height)).getbbox() or (0, 0, 1, upper.height)
    side = max(1, round(share * min(image.size)))
    x, y = right - side // 2, top + (column[1] + column[3]) // 2 - side // 2
    x, y = min(max(x, 0), image.width - side), min(max(y, 0), image.height - side)
    return image.convert("RGB").crop((x, y, x + side, y + side))


def stage_sheet(result: Result) -> Image.Image:
    """One row: what each stage of a request did (needs a result made with `keep_stages`)."""
    tiles = [Figure(picture, name.replace("_", " ")) for name, picture in result.stages.items()]
    tiles.append(Figure(result.images[0], "result"))
    return contact_sheet([Row(result.request.prompt or "(no prompt)", tiles)])


def html_report(title: str, sheet: Image.Image, tables: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A page that stands alone: the sheet and tables of text, the first row of each being its head."""
    return html_page(title, [html_picture(sheet, "contact sheet"), *(html_table(name, rows) for name, rows in tables)])


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page that stands alone; parts: HTML, one below the other."""
    return "\n".join([html_head(title), *parts, "</body></html>\n"])


def html_head(title: str, style: str = "") -> str:
    """A page down to its heading, for one that is written piece by piece.

    style: CSS beside that of every page.
    """
    return _HEAD.format(title=html.escape(title), style=style)


def html_table(name: str, rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table of text, whose first row is its head."""
    lines = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{cell}>{html.escape(str(text))}</{cell}>" for text in row) + "</tr>")
    return "\n".join([f"<h2>{html.escape(name)}</h2><table>", *lines, "</table>"])


def html_picture(image: Image.Image, alt: str) -> str:
    """A picture that is held by the page itself."""
    return f'<img alt="{html.escape(alt)}" src="{_data_uri(image)}">'


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _break_lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
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


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c20; background: #fcfbf8; max-width: 1160px;
  margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; border: 1px solid #ddd }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e2dc; vertical-align: top;
  overflow-wrap: anywhere }}
{style}</style></head><body>
<h1>{title}</h1>
"""
