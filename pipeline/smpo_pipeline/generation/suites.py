"""Published suites of prompts: where their files are, and how one is named on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath, StorePath, parse_path
from smpo_pipeline.generation.prompt_files import json_rows
from smpo_pipeline.generation.prompts import PromptSet, read_prompts


@dataclass(frozen=True)
class Suite:
    """A published suite.

    Attributes:
        origin: where its files are published, for people.
        files: their names, or patterns that each match one, in its folder; several are named after categories.
        hub: that folder on the hub; None: they are not there.
    """

    origin: str
    files: tuple[str, ...]
    hub: str | None


SUITES = {
    # 4 x 800 prompts; drawbench.json beside them is another suite.
    "hpsv2": Suite(
        "the folder benchmark/ of huggingface.co/datasets/zhwang/HPDv2",
        ("anime.json", "concept-art.json", "paintings.json", "photo.json"),
        "hf://datasets/zhwang/HPDv2/benchmark",
    ),
    # 1632 prompts
    "parti": Suite("github.com/google-research/parti", ("PartiPrompts.tsv",), "hf://datasets/nateraw/parti-prompts"),
    # 500 prompts, one of each of its test split
    "papv2": Suite(
        "huggingface.co/datasets/yuvalkirstain/pickapic_v2_no_images",
        ("test_unique*.parquet",),
        "hf://datasets/yuvalkirstain/pickapic_v2_no_images/data",
    ),
    # 200 prompts
    "drawbench": Suite(
        "huggingface.co/datasets/Jialuo21/DrawBench", ("test-*.parquet",), "hf://datasets/Jialuo21/DrawBench/data"
    ),
    # 553 prompts
    "geneval": Suite("github.com/djghosh13/geneval, in prompts/", ("evaluation_metadata.jsonl",), None),
}


@dataclass(frozen=True)
class PromptSource:
    """What ``--prompts`` names.

    Attributes:
        suite: a published suite, or None.
        path: a file, or the folder of a suite; None: the suite's own on the hub.
    """

    suite: str | None
    path: AnyPath | None

    def __str__(self) -> str:
        return "=".join(str(part) for part in (self.suite, self.path) if part is not None)

    @classmethod
    def parse(cls, text: str) -> PromptSource:
        """Parse ``SUITE``, ``SUITE=PATH`` or ``PATH``.

        Raises:
            UserError: there is no such file or folder, or no such suite.
        """
        name, equals, given = text.partition("=")
        if name in SUITES and (equals or not Path(text).exists()):
            return cls(name, _existing(given, text) if given else None)
        if "://" not in text and not Path(text).exists() and "/" not in text and not Path(text).suffix:
            raise UserError(f"--prompts {text}: there is no such file; published suites: {', '.join(SUITES)}")
        return cls(None, _existing(text, text))

    def files(self) -> list[AnyPath]:
        """List the files with the prompts.

        Raises:
            UserError: a file of the suite is missing, or the suite is not on the hub.
        """
        if self.path and (self.suite is None or not _is_folder(self.path)):
            return [self.path]
        suite = SUITES[str(self.suite)]
        folder = self.path or self._on_hub()
        return [_one(folder, pattern, f"--prompts {self}", suite.origin) for pattern in suite.files]

    def read(self, limit: int | None = None, category_column: str | None = None) -> PromptSet:
        """Read the distinct prompts.

        Args:
            limit: maximum number of prompts.
            category_column: name of the column of categories.

        Raises:
            UserError: a file is missing or malformed, or a prompt cannot be used.
        """
        parts = {file.name: read_prompts(file, None, category_column) for file in self.files()}
        if len(parts) == 1:
            return next(iter(parts.values())).first(limit)
        return PromptSet.joined({Path(name).stem: part for name, part in parts.items()}).first(limit)

    def geneval_rows(self, prompts: PromptSet) -> list[dict[str, Any]] | None:
        """Return the row of each prompt in GenEval's file, which its scorer reads; None for other suites.

        Raises:
            UserError: a row lacks what the scorer needs.
        """
        if self.suite != "geneval":
            return None
        (path,) = self.files()
        if path.suffix != ".jsonl":
            raise UserError(f"--prompts {self}: its scorer needs its JSON lines, from {SUITES['geneval'].origin}")
        lines = list(json_rows(path))
        rows = [lines[number] for number in prompts.rows]
        for row in rows:
            if not {"tag", "include"} <= row.keys():
                raise UserError(f"--prompts {self}: {row['prompt']!r} lacks tag or include, which its scorer reads")
        return rows

    def _on_hub(self) -> AnyPath:
        suite = SUITES[str(self.suite)]
        way = f"give its file or folder, from {suite.origin}: --prompts {self.suite}=PATH"
        if suite.hub is None:
            raise UserError(f"--prompts {self.suite}: this suite is not read from the hub; {way}")
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"--prompts {self.suite}: HF_HUB_OFFLINE=1; {way}")
        return StorePath(suite.hub)


def _existing(text: str, given: str) -> AnyPath:
    """Parse a path or URL; URLs are checked when they are read."""
    path = parse_path(text)
    if isinstance(path, Path) and not path.exists():
        raise UserError(f"--prompts {given}: {path} does not exist")
    return path.absolute()


def _is_folder(path: AnyPath) -> bool:
    # By its name where it is a URL, which saves a request.
    return path.is_dir() if isinstance(path, Path) else not path.suffix


def _one(folder: AnyPath, pattern: str, given: str, origin: str) -> AnyPath:
    """Return the file of a folder that matches."""
    found: list[AnyPath] = sorted(folder.glob(pattern), key=str)
    if len(found) != 1:
        many = f"{len(found)} files match {pattern}" if found else f"no file matches {pattern}"
        raise UserError(f"{given}: {many} in {folder}; name the suite's own files, from {origin}")
    return found[0]
