"""Draw contact sheets of pictures and text with PIL.

Every function returns an RGB image, and larger images are put together from smaller ones. Sizes are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont, ImageOps

from smpo_common.files import atomic_path

PAGE, CARD, TEXT, SOFT = "#f4f4f2", "#ffffff", "#1c1c1f", "#6b6b73"
WINNER, MISSING = "#12805c", "#e4e4e0"
_LINE_SPACING = 1.35
_SIDE_BY_SIDE_GAP = 8


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib includes; it has Latin, Greek and Cyrillic, but no Chinese or Japanese."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def text_block(
    text: str,
    width: int,
    *,
    size: int = 13,
    colour: str = TEXT,
    bold: bool = False,
    lines: int = 2,
    background: str = CARD,
) -> Image.Image:
    """Wrap text to ``width``, with an ellipsis after ``lines`` lines."""
    font = _font(size, bold)
    # Characters are at least a pixel wide: measuring a hostile text of megabytes would be slow.
    wrapped = _wrapped(text[: lines * width], font, width)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " …"]
    height = round(size * _LINE_SPACING)
    block = Image.new("RGB", (width, height * len(wrapped)), background)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(wrapped):
        draw.text((0, number * height), _fitted(line, font, width), font=font, fill=colour)
    return block


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap words into lines; a word that is wider than a line gets its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fitted(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line.removesuffix("…").rstrip()[:-1] + "…"
    return line


def tile(image: Image.Image | None, side: int, *, frame: str | None = None, note: str = "") -> Image.Image:
    """Fit a picture into a square; small ones are enlarged without smoothing.

    Args:
        image: the picture; None: draw ``note`` on grey.
        side: of the square.
        frame: colour of a frame around it.
        note: why there is no picture.
    """
    square = Image.new("RGB", (side, side), MISSING)
    if image is None:
        square.paste(text_block(note, side - 16, size=11, colour=SOFT, lines=6, background=MISSING), (8, 8))
    else:
        enlarged = max(image.size) < side
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        fitted = ImageOps.contain(image, (side, side), method)
        square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    if frame:
        ImageDraw.Draw(square).rectangle((0, 0, side - 1, side - 1), outline=frame, width=4)
    return square


def row(parts: Sequence[Image.Image], gap: int = _SIDE_BY_SIDE_GAP, background: str = CARD) -> Image.Image:
    """Put pictures side by side, aligned at the top."""
    size = (sum(part.width for part in parts) + gap * (len(parts) - 1), max(part.height for part in parts))
    joined = Image.new("RGB", size, background)
    left = 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width + gap
    return joined


def column(parts: Sequence[Image.Image], gap: int = 6, padding: int = 0, background: str = CARD) -> Image.Image:
    """Put pictures below each other, aligned at the left, with a margin around them."""
    width = max(part.width for part in parts) + 2 * padding
    joined = Image.new(
        "RGB", (width, sum(part.height for part in parts) + gap * (len(parts) - 1) + 2 * padding), background
    )
    top = padding
    for part in parts:
        joined.paste(part, (padding, top))
        top += part.height + gap
    return joined


def page(title: str, subtitle: str, cards: Sequence[Image.Image], columns: Literal[1, 2, 3]) -> Image.Image:
    """Make a sheet: a heading, and cards in rows of equal height."""
    width = max(max((card.width for card in cards), default=0) * columns + 16 * (columns - 1), 640)
    heading = [
        text_block(title, width, size=20, bold=True, lines=1, background=PAGE),
        text_block(subtitle, width, size=12, colour=SOFT, lines=2, background=PAGE),
    ]
    rows = []
    for start in range(0, len(cards), columns):
        line = cards[start : start + columns]
        height = max(card.height for card in line)
        rows.append(row([_stretched(card, height) for card in line], gap=16, background=PAGE))
    return column([*heading, *rows], gap=14, padding=24, background=PAGE)


def _stretched(card: Image.Image, height: int) -> Image.Image:
    taller = Image.new("RGB", (card.width, height), CARD)
    taller.paste(card, (0, 0))
    return taller


def save_sheet(sheet: Image.Image, target: Path) -> None:
    """Write a sheet as PNG, atomically."""
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")
