"""Folders of images that other programs made, which are scored as a model's: ``--images NAME=DIR``."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.files import sha256_file, sha256_json
from smpo_pipeline.generation.prompt_files import json_rows

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_NAME = re.compile(r"(?P<prompt>\d+)(?:[-_](?P<image>\d+))?")
_METADATA = ("metadata.jsonl", "metadata.csv")
_TEXTS = ("prompt", "caption", "text")

_Images = Mapping[int, Sequence[Path]]
"""Images by the number of their prompt, in the order of their own numbers."""


@dataclass(frozen=True)
class ImageFolder:
    """Images of all prompts.

    Attributes:
        name: its name in tables.
        source: the folder, as the user gave it.
        files: of the images, prompt by prompt.
    """

    name: str
    source: str
    files: tuple[Path, ...]

    @cached_property
    def identity(self) -> str:
        """Hash of all images, in order."""
        return sha256_json([sha256_file(file) for file in self.files])


def read_image_folder(
    name: str, source: str, prompts: Sequence[str], images_per_prompt: int, *, more_prompts: bool
) -> ImageFolder:
    """Find the images of all prompts in a folder.

    Images are named by the number of their prompt and, if a prompt has several, their own: ``00012.png``,
    ``00012-03.png``, or ``00012/samples/00003.png`` as GenEval's scorer wants them. Or ``metadata.jsonl`` or
    ``metadata.csv`` gives ``file_name`` and ``prompt`` (or ``caption`` or ``text``) of each, as in Hugging Face's image
    folders. Prompts are numbered from 0, in the order of ``prompts``; the numbers of a prompt's images only order them.

    Args:
        name: its name in tables.
        source: the folder.
        prompts: all prompts.
        images_per_prompt: number of images that each must have.
        more_prompts: whether the folder may have images of other prompts, too.

    Raises:
        UserError: a prompt has too few or too many images, or the folder has another layout.
    """
    given, folder = f"--images {name}={source}", Path(source)
    if not folder.is_dir():
        raise UserError(f"{given}: {source} is not a folder")
    table = next((folder / file for file in _METADATA if (folder / file).is_file()), None)
    images = _listed(given, table, prompts, more_prompts) if table else _numbered(given, folder)
    surplus = [number for number in images if number >= len(prompts)]
    if surplus and not more_prompts:
        raise UserError(
            f"{given}: {images[min(surplus)][0].relative_to(folder)} is of prompt {min(surplus)}, but --prompts has "
            f"{len(prompts)}, numbered from 0"
        )
    wrong = [number for number in range(len(prompts)) if len(images.get(number, ())) != images_per_prompt]
    if wrong:
        raise UserError(_describe_wrong(given, images, prompts, images_per_prompt, wrong))
    files = tuple(file.absolute() for number in range(len(prompts)) for file in images[number])
    return ImageFolder(name, source, files)


def _describe_wrong(
    given: str, images: _Images, prompts: Sequence[str], images_per_prompt: int, wrong: Sequence[int]
) -> str:
    first, counts = wrong[0], {len(images.get(number, ())) for number in range(len(prompts))}
    if len(counts) == 1 and counts != {0}:
        count = counts.pop()
        return f"{given}: each prompt has {count} images; give --images-per-prompt {count}, not {images_per_prompt}"
    return (
        f"{given}: {len(wrong)} of {len(prompts)} prompts do not have {images_per_prompt} images "
        f"(--images-per-prompt); the first is prompt {first}, with {len(images.get(first, ()))}: {prompts[first]!r}"
    )


def _numbered(given: str, folder: Path) -> _Images:
    """Find images by the numbers in their names."""
    nested = [inside for inside in folder.iterdir() if inside.name.isdigit() and (inside / "samples").is_dir()]
    if nested:
        return {
            int(inside.name): _ordered(given, inside / "samples", _pictures(inside / "samples")) for inside in nested
        }
    by_prompt = defaultdict(list)
    for file in _pictures(folder):
        match = _NAME.fullmatch(file.stem)
        if match is None:
            raise UserError(
                f"{given}: {file.name} does not say whose it is; name images PROMPT.png or PROMPT-IMAGE.png by numbers "
                f"from 0, or write {' or '.join(_METADATA)} with file_name and prompt"
            )
        by_prompt[int(match["prompt"])].append(file)
    if not by_prompt:
        raise UserError(f"{given}: the folder holds no images ({', '.join(sorted(_SUFFIXES))})")
    return {prompt: _ordered(given, folder, files) for prompt, files in by_prompt.items()}


def _pictures(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]


def _ordered(given: str, folder: Path, files: Iterable[Path]) -> list[Path]:
    """Order a prompt's images by their numbers."""
    numbered: dict[int, Path] = {}
    for file in files:
        match = _NAME.fullmatch(file.stem)
        number = int((match["image"] or match["prompt"]) if match else -1)
        if number < 0 or number in numbered:
            other = f"{numbered[number].name} and " if number in numbered else ""
            raise UserError(f"{given}: {other}{file.name} in {folder} have no numbers of their own")
        numbered[number] = file
    return [numbered[number] for number in sorted(numbered)]


def _listed(given: str, table: Path, prompts: Sequence[str], more_prompts: bool) -> _Images:
    """Find images by a table of file names and prompts."""
    numbers, by_prompt = {prompt: number for number, prompt in enumerate(prompts)}, defaultdict(list)
    for row in _rows(given, table):
        texts = [row[name] for name in _TEXTS if row.get(name) is not None]
        if not texts or not row.get("file_name"):
            raise UserError(f"{given}: a row of {table.name} lacks file_name or prompt: {json.dumps(row)[:200]}")
        file, prompt = table.parent / str(row["file_name"]), str(texts[0]).strip()
        if not file.is_file():
            raise UserError(f"{given}: {file} is missing, which {table.name} lists")
        if prompt in numbers:
            by_prompt[numbers[prompt]].append(file)
        elif not more_prompts:
            raise UserError(f"{given}: {file.name} is of a prompt that --prompts lacks: {prompt!r}")
    return by_prompt


def _rows(given: str, table: Path) -> list[dict[str, object]]:
    try:
        if table.suffix == ".csv":
            with table.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, strict=True))
        return list(json_rows(table, f"{given}: {table.name}"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{given}: {table} cannot be read: {error}") from error
