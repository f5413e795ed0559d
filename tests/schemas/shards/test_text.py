"""Files of prompts' embeddings: what is written is read, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_schemas.manifest import StoredTextEntry
from smpo_schemas.shards.text import (
    TEXT_INDEX,
    StoredText,
    text_bytes,
    text_file_name,
    verify_text,
    write_text,
    write_text_index,
)
from smpo_schemas.shards.text_rows import TextRow

PROMPTS = ["", "a cat", "Größe 東京", "dog " * 500, "a dog", "a cat "]
PER_FILE = 4


def embeddings(prompts: list[str], dtype: torch.dtype = torch.float32, *, ragged: bool = False) -> list[TextRow]:
    """Numbers that no two prompts share; ragged texts have 3, 1, 4, 2, 5 and 3 tokens."""
    rows = []
    for prompt in prompts:
        number = PROMPTS.index(prompt)
        length = (3, 1, 4, 2, 5, 3)[number] if ragged else 3
        text = (number * 100 + torch.arange(2.0 * length).reshape(length, 2)).to(dtype)
        row = {"text": text, "pooled": torch.tensor([-number], dtype=dtype)}
        rows.append(row | ({"mask": torch.ones(length, dtype=torch.bool)} if ragged else {}))
    return rows


def written(folder: Path, dtype: torch.dtype = torch.float32, *, ragged: bool = False) -> StoredTextEntry:
    files = []
    for number, start in enumerate(range(0, len(PROMPTS), PER_FILE)):
        some = PROMPTS[start : start + PER_FILE]
        files.append(write_text(folder / text_file_name(number), some, embeddings(some, dtype, ragged=ragged)))
    cut = [len(prompt) > 100 for prompt in PROMPTS]
    index = write_text_index(folder / TEXT_INDEX, PROMPTS, cut, PER_FILE)
    size = index.bytes + sum(file.bytes for file in files)
    name = str(dtype).removeprefix("torch.")
    return StoredTextEntry(dtype=name, prompts=len(PROMPTS), bytes=size, index=index, files=files)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_prompt_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype, ragged: bool) -> None:
    entry = written(tmp_path, dtype, ragged=ragged)
    text = StoredText(tmp_path, entry)
    asked = [PROMPTS[5], PROMPTS[0], PROMPTS[3], PROMPTS[5], PROMPTS[2]]
    for row, expected in zip(text(asked), embeddings(asked, dtype, ragged=ragged), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(row[name], value)
            assert row[name].dtype == value.dtype
    assert [text.cuts(prompt) for prompt in PROMPTS] == [False, False, False, True, False, False]
    assert text.find(["no such prompt", *PROMPTS[:1]]).tolist()[0] == -1
    assert text.files_of(text.find(PROMPTS)).tolist() == [0, 0, 0, 0, 1, 1]
    stock = [safetensors.torch.load_file(tmp_path / file.name) for file in entry.files]
    join = torch.cat if ragged else torch.stack
    expected = join([row["text"] for row in embeddings(PROMPTS, dtype, ragged=ragged)])
    assert torch.equal(torch.cat([tensors["text"] for tensors in stock]), expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_bytes_are_known_before(tmp_path: Path, ragged: bool) -> None:
    entry = written(tmp_path, ragged=ragged)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert text_bytes(len(PROMPTS), embeddings(PROMPTS, ragged=ragged), PER_FILE) == entry.bytes == on_disk


def test_a_text_that_ends_outside_its_file_is_refused(tmp_path: Path) -> None:
    text = StoredText(tmp_path, written(tmp_path, ragged=True))
    path = tmp_path / text_file_name(0)
    tensors = safetensors.torch.load_file(path)
    for ends in ([3, 4, 8, 11], [3, 4, 3, 10], [-1, 4, 8, 10]):
        safetensors.torch.save_file({**tensors, "text_end": torch.tensor(ends)}, path)
        with pytest.raises(UserError, match=r"text-000000\.safetensors is malformed: the text of its row"):
            text(PROMPTS[:4])


def test_a_prompt_that_is_not_stored_is_named(tmp_path: Path) -> None:
    text = StoredText(tmp_path, written(tmp_path))
    with pytest.raises(UserError, match="lacks the prompt 'another'.*--overwrite"):
        text(["a cat", "another"])


@pytest.mark.parametrize("name", [TEXT_INDEX, text_file_name(1)])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    entry = written(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    message = {"missing": "is missing", "cut": f"has {len(content) - 1} bytes", "altered": "differs from the SHA-256"}
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} {message[damage]}.*copy the folder.*--overwrite"):
        if name == TEXT_INDEX:
            StoredText(tmp_path, entry)
        verify_text(tmp_path, entry.files[1])


def test_a_file_that_changes_after_it_was_verified_is_named(tmp_path: Path) -> None:
    entry = written(tmp_path)
    text = StoredText(tmp_path, entry)
    path = tmp_path / text_file_name(0)
    whole = path.read_bytes()
    for content in (whole[:-30], whole[:4], b"", b"\xff" * len(whole), (tmp_path / text_file_name(1)).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"text-000000\.safetensors (cannot be read|is malformed).*--overwrite"):
            text([PROMPTS[3]])


@pytest.mark.parametrize(
    "change",
    [
        {"file": torch.tensor([0, 0, 0, 0, 1, 2])},
        {"row": torch.tensor([0, 1, 2, 3, 0, 2])},
        {"row": torch.tensor([0, 1, 2, -1, 0, 1])},
        {"key": torch.zeros(6, dtype=torch.int64)},
        {"key": torch.arange(7)},
        {"cut": torch.zeros(6)},
    ],
    ids=str,
)
def test_a_hostile_index_is_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    """Its hash is the manifest's, its values are impossible."""
    entry = written(tmp_path)
    path = tmp_path / TEXT_INDEX
    tensors = safetensors.torch.load_file(path)
    if "file" in change or "row" in change:
        change = {name: value.to(torch.int32) for name, value in change.items()}
        order = tensors["file"].argsort(stable=True)
        change = {name: torch.empty_like(value).scatter_(0, order, value) for name, value in change.items()}
    safetensors.torch.save_file({**tensors, **change}, path)
    forged = entry.index.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256_file(path)})
    with pytest.raises(UserError, match=r"index\.safetensors .*--overwrite"):
        StoredText(tmp_path, entry.model_copy(update={"index": forged}))
