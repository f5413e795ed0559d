"""Where a model's images lie in an evaluation's folder. Does not import torch: encoding workers start fast."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_common.files import read_json, write_json

ORIGIN_FILE = "made_from.json"
_METADATA_FILE = "metadata.jsonl"


@dataclass(frozen=True)
class PictureFiles:
    """The image files of one model.

    Attributes:
        folder: of the model's images.
        nested: whether each prompt has a folder of its own, as GenEval's scorer expects: ``00000/samples/00000.png``
            beside ``00000/metadata.jsonl``. Else an image is ``00000-00.png``.
    """

    folder: Path
    nested: bool

    def path(self, prompt: int, index: int) -> Path:
        """Return the file of image ``index`` of a prompt, by its number."""
        if self.nested:
            return self.folder / f"{prompt:05d}" / "samples" / f"{index:05d}.png"
        return self.folder / f"{prompt:05d}-{index:02d}.png"

    def claim(self, origin: Mapping[str, str], metadata: Sequence[Mapping[str, Any]] | None) -> None:
        """Record the settings and weights of the images in the folder; remove images of other ones.

        Args:
            origin: of the images.
            metadata: of each prompt, if ``nested``.
        """
        if self.origin() not in (None, origin):
            for stale in self.folder.glob("*.png"):
                stale.unlink()
            for stale in self.folder.glob("[0-9]*/"):
                shutil.rmtree(stale)
        write_json(self.folder / ORIGIN_FILE, dict(origin))
        for number, row in enumerate(metadata or ()):
            write_json(self.folder / f"{number:05d}" / _METADATA_FILE, row)

    def origin(self) -> dict[str, str] | None:
        """Read what the images are made from; None if there is no record."""
        path = self.folder / ORIGIN_FILE
        return dict(read_json(path)) if path.is_file() else None

    def require(self, origin: Mapping[str, str]) -> None:
        """Check that the folder is still claimed for these images, before a worker, which may outlive its run, writes.

        Raises:
            UserError: another evaluation has claimed the folder.
        """
        if self.origin() != origin:
            raise UserError(f"stopped: another evaluation was started in {self.folder}")
