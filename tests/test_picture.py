"""The README's picture: which images of the demo's output it shows, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import picture
from PIL import Image

from smpo_common.errors import UserError


def test_the_first_image_of_evenly_spread_prompts(tmp_path: Path) -> None:
    """Image 0 of prompt n is grey n in the base and 100 + n in the tuned model; other images are white."""
    prompts = tmp_path / "world" / "prompts" / "test.txt"
    prompts.parent.mkdir(parents=True)
    prompts.write_text("".join(f"prompt {number}\n" for number in range(6)))
    for model, shift in (("base", 0), ("tuned", 100)):
        folder = tmp_path / "report" / "images" / model
        folder.mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), shift + number).save(folder / f"{number:05d}-00.png")
            Image.new("L", (8, 8), 255).save(folder / f"{number:05d}-01.png")
    picture.picture(tmp_path, tmp_path / "out.png", 3)
    drawn = Image.open(tmp_path / "out.png")
    middles = [picture.LABEL + column * (picture.SIDE + picture.GAP) + picture.SIDE // 2 for column in range(3)]
    tops = [picture.GAP + picture.CAPTION + row * (picture.SIDE + picture.GAP) for row in range(2)]
    shown = [[drawn.getpixel((x, top + picture.SIDE // 2)) for x in middles] for top in tops]
    assert shown == [[(value,) * 3 for value in row] for row in ((0, 2, 4), (100, 102, 104))]


def test_without_the_demo_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make demo"):
        picture.picture(tmp_path, tmp_path / "out.png", 3)
