"""Draws the README's picture from the demo's output: base and tuned model side by side for some held-out prompts.

    make picture

The prompts are spread evenly over the held-out ones, and of each the first image is shown: nothing is chosen by score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from smpo_common.commandline import run_app
from smpo_common.errors import UserError
from smpo_pipeline.evaluation.evaluation import IMAGES_FOLDER
from smpo_pipeline.inspection.sheet import PAGE, SOFT, text_block

MODELS = ("base", "tuned")
SIDE, GAP, LABEL, CAPTION = 112, 8, 56, 56

app = typer.Typer()


def draw(prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The picture.

    Args:
        prompts: P texts.
        images: of each model of :data:`MODELS`, P images.
    """
    width = LABEL + len(prompts) * (SIDE + GAP)
    height = GAP + CAPTION + len(MODELS) * (SIDE + GAP)
    page = Image.new("RGB", (width, height), PAGE)
    for column, prompt in enumerate(prompts):
        caption = text_block(prompt, SIDE, size=12, lines=3, background=PAGE)
        page.paste(caption, (LABEL + column * (SIDE + GAP), GAP))
    for row, (name, shown) in enumerate(zip(MODELS, images, strict=True)):
        top = GAP + CAPTION + row * (SIDE + GAP)
        label = text_block(name, LABEL - GAP, size=13, bold=True, lines=1, colour=SOFT, background=PAGE)
        page.paste(label, (GAP, top + SIDE // 2 - label.height // 2))
        for column, image in enumerate(shown):
            enlarged = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            page.paste(enlarged, (LABEL + column * (SIDE + GAP), top))
    return page


@app.command()
def picture(
    demo: Annotated[Path, typer.Option(help="The demo's folder.")] = Path("demo"),
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("docs/images/demo.png"),
    count: Annotated[int, typer.Option(min=1, help="How many prompts are shown.")] = 8,
) -> None:
    """Write the picture."""
    prompts_file, images = demo / "world" / "prompts" / "test.txt", demo / "report" / IMAGES_FOLDER
    if not (prompts_file.is_file() and images.is_dir()):
        raise UserError(f"--demo {demo} holds no finished demo; run `make demo` first")
    prompts = prompts_file.read_text(encoding="utf-8").splitlines()
    numbers = range(0, len(prompts), -(-len(prompts) // count))
    shown = [[Image.open(images / name / f"{number:05d}-00.png") for number in numbers] for name in MODELS]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw([prompts[number] for number in numbers], shown).save(out, optimize=True)
    print(f"wrote {out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_app(app)
