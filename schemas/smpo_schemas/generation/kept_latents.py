"""Latents that ``generate --keep`` stored, read image by image.

Shape suffixes: M states, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.choices import Dtype
from smpo_schemas.generation.candidates import Candidates
from smpo_schemas.shards.tensor_file import StoredTensor, TensorFile, reading_tensors

_REMEDY = "copy the folder of the candidates again, or generate again with --overwrite"


@dataclass(frozen=True)
class CandidateFolder:
    """A finished output of ``generate --keep``, in brief.

    Attributes:
        path: the folder.
        sizes: bytes of its files of latents, by name.
        seed: seed of the images' initial noise.
        images_per_prompt: K.
        dtype: dtype of the model; the initial noise was rounded to it.
    """

    path: AnyPath
    sizes: Mapping[str, int]
    seed: int
    images_per_prompt: int
    dtype: Dtype

    @classmethod
    def of(cls, path: AnyPath, candidates: Candidates) -> Self:
        """Describe a folder by its ``candidates.json``."""
        sizes = {part.kept.name: part.kept.bytes for part in candidates.parts if part.kept}
        return cls(path, sizes, candidates.seed, candidates.images_per_prompt, candidates.dtype)


@dataclass(frozen=True)
class KeptImage:
    """What is kept of one image.

    Attributes:
        folder: the folder that has it.
        latents_Chw: what the VAE decoded, normalised, float32.
        timesteps: timesteps of its M states, decreasing; none where only latents were kept.
        states_MChw: the states: inputs of the sampler's steps at these timesteps, normalised, float32.
    """

    folder: CandidateFolder
    latents_Chw: np.ndarray
    timesteps: tuple[float, ...]
    states_MChw: np.ndarray


class KeptLatents:
    """The latents in some folders; files are opened when they are needed, and closed at the end of the context."""

    def __init__(self, folders: Sequence[CandidateFolder]) -> None:
        self._folders = folders
        self._files: dict[AnyPath, TensorFile] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def find(self, name: object, image: str) -> KeptImage | None:
        """Read what is kept of an image; None if no folder has it.

        Args:
            name: name of the file of latents, from the image's row.
            image: hash of the image file's content (:func:`smpo_schemas.pairs.image_id`).

        Raises:
            UserError: a file is missing, damaged or not the one that was written.
        """
        for folder in self._folders:
            if isinstance(name, str) and name in folder.sizes:
                path = folder.path / name
                with reading_tensors(path, _REMEDY):
                    tensors = self._open(path, folder.sizes[name])
                    if image in tensors:
                        return _read(tensors, image, folder)
        return None

    def _open(self, path: AnyPath, size: int) -> TensorFile:
        if path not in self._files:
            if path.stat().st_size != size:
                raise UserError(f"{path} has {path.stat().st_size} bytes, candidates.json says {size}; {_REMEDY}")
            file = self._closing.enter_context(path.open("rb"))
            self._files[path] = TensorFile(file, 0, size)
        return self._files[path]


def _read(tensors: TensorFile, image: str, folder: CandidateFolder) -> KeptImage:
    latents_Chw = _floats(tensors[image], 3)
    if f"{image}.states" not in tensors:
        return KeptImage(folder, latents_Chw, (), np.empty((0, *latents_Chw.shape), np.float32))
    timesteps, states_MChw = _floats(tensors[f"{image}.timesteps"], 1), _floats(tensors[f"{image}.states"], 4)
    if states_MChw.shape != (len(timesteps), *latents_Chw.shape):
        raise ValueError(f"{image} has {len(timesteps)} timesteps and states {states_MChw.shape}")
    return KeptImage(folder, latents_Chw, tuple(timesteps.tolist()), states_MChw)


def _floats(tensor: StoredTensor, dimensions: int) -> np.ndarray:
    values = tensor.read().numpy()
    if values.dtype != np.float32 or values.ndim != dimensions:
        raise ValueError(f"a tensor is {values.dtype} {values.shape}")
    return values
