"""Several pictures on one: prompts with what was drawn for them, and pictures with their copies."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 4
_LINES = 4
_MARGIN = 8


def contact_sheet(
    prompts: Sequence[str], pictures: Sequence[Image.Image | None], side: int = 256
) -> Image.Image:
    """All pictures in rows of four at `side` pixels, each above its prompt; None is left gray."""
    font = ImageFont.load_default()
    height = int(font.getbbox("Xg")[3]) + 3
    wide = max(1, (side - 4) // max(1, int(font.getlength("n"))))
    cell = side + 2 * _MARGIN, side + _LINES * height + 2 * _MARGIN
    rows = -(-len(prompts) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell[0], max(1, rows) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x = number % _COLUMNS * cell[0] + _MARGIN
        y = number // _COLUMNS * cell[1] + _MARGIN
        if picture is None:
            pen.rectangle((x, y, x + side, y + side), fill="lightgray")
        else:
            sheet.paste(picture.convert("RGB").resize((side, side)), (x, y))
        lines = textwrap.wrap(prompt, wide)[:_LINES]
        for line, text in enumerate(lines):
            pen.text((x, y + side + 2 + line * height), text, fill="black", font=font)
    return sheet


def picture_rows(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures, all of the first one's size; a column holds a picture and its copies."""
    width, height = rows[0][0].size
    step = width + _MARGIN, height + _MARGIN
    sheet = Image.new("RGB", (max(map(len, rows)) * step[0], len(rows) * step[1]), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB").resize((width, height)), (x * step[0], y * step[1]))
    return sheet
