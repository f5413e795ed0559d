"""Reading kept latents image by image, here and on an object store; damaged files are named."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from smpo_common.errors import UserError
from smpo_common.store_path import StorePath
from smpo_schemas.generation.kept_latents import CandidateFolder, KeptLatents

NAME = "latents-000000.safetensors"


def tensors(seed: int, image: str = "a", states: int = 2) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal((1 + states, 4, 2, 2), np.float32)
    times = {f"{image}.states": values[1:], f"{image}.timesteps": np.arange(states, 0, -1, dtype=np.float32)}
    return {image: values[0], **(times if states else {})}


def write(path: Path, *more: dict[str, np.ndarray]) -> CandidateFolder:
    path.mkdir()
    save_file({name: value for each in more for name, value in each.items()}, path / NAME)
    return CandidateFolder(path, {NAME: (path / NAME).stat().st_size}, 7, 4, "fp32")


def test_an_image_is_found_in_the_folder_that_has_it(tmp_path):
    """Both folders have a file of this name."""
    first = write(tmp_path / "first", tensors(0), tensors(1, "b", states=0))
    second = write(tmp_path / "second", tensors(2, "c"))
    with KeptLatents([first, second]) as kept:
        for seed, image, folder in ((0, "a", first), (2, "c", second)):
            found, expected = kept.find(NAME, image), tensors(seed, image)
            assert found.folder is folder
            assert found.timesteps == (2.0, 1.0)
            np.testing.assert_array_equal(found.latents_Chw, expected[image])
            np.testing.assert_array_equal(found.states_MChw, expected[f"{image}.states"])
        assert kept.find(NAME, "b").states_MChw.shape == (0, 4, 2, 2)
        for name, image in ((NAME, "d"), ("other.safetensors", "a"), (f"../first/{NAME}", "a"), (None, "a"), (3, "a")):
            assert kept.find(name, image) is None


def test_an_image_is_found_on_an_object_store(tmp_path):
    local = write(tmp_path / "here", tensors(0))
    fsspec.filesystem("memory").put(str(local.path / NAME), f"/kept/{NAME}")
    with KeptLatents([CandidateFolder(StorePath("memory://kept"), local.sizes, 7, 4, "fp32")]) as kept:
        np.testing.assert_array_equal(kept.find(NAME, "a").latents_Chw, tensors(0)["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.zeros((4, 2, 2), np.float16)}, r"float16 \(4, 2, 2\)"),
        ({"a": np.zeros((4, 2), np.float32)}, r"float32 \(4, 2\)"),
        ({**tensors(0), "a.timesteps": np.zeros(3, np.float32)}, r"3 timesteps and states \(2, 4, 2, 2\)"),
        ({name: value for name, value in tensors(0).items() if name != "a.timesteps"}, "a.timesteps"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    folder = write(tmp_path / "kept", content)
    with KeptLatents([folder]) as kept, pytest.raises(UserError, match=f"^{folder.path / NAME} .*{message}.*copy"):
        kept.find(NAME, "a")


def test_a_file_that_is_missing_or_cut_is_named(tmp_path):
    folder = write(tmp_path / "kept", tensors(0))
    path = folder.path / NAME
    for change, message in (
        (lambda: path.write_bytes(b"\xff" * folder.sizes[NAME]), "is malformed"),
        (lambda: path.write_bytes(path.read_bytes()[:-4]), "candidates.json says"),
        (path.unlink, "cannot be read"),
    ):
        change()
        with KeptLatents([folder]) as kept, pytest.raises(UserError, match=f"^{path} .*{message}.*copy the folder"):
            kept.find(NAME, "a")
