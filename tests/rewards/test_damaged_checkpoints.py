"""Truncated or damaged torch files are one line, whatever the unpickler raises."""

from __future__ import annotations

import io

import pytest
import torch

from smpo_common.errors import UserError
from smpo_pipeline.rewards.networks.weights import read_checkpoint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_cut_or_overwritten_anywhere_is_read_or_refused(tmp_path, zipped):
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2, 2)}, buffer, _use_new_zipfile_serialization=zipped)
    whole, path, said = buffer.getvalue(), tmp_path / "weights.pt", list[str]()
    cut = [whole[:size] for size in range(0, len(whole), 1 if len(whole) < 1000 else 7)]
    # LONG4, LONG1, BINUNICODE, BINGET, STOP, and an invalid opcode: lengths and offsets beyond the file.
    written = [
        whole[:place] + code + whole[place + 1 :]
        for place in range(0, len(whole), 11)
        for code in (b"\x8b", b"\x8a", b"X", b"h", b".", b"\xff")
    ]
    for content in (*cut, *written):
        path.write_bytes(content)
        try:
            read_checkpoint(path, "--reward x=PATH")
        except UserError as error:
            said.append(str(error))
    assert len(said) > len(cut) // 2
    assert not [line for line in said if "\n" in line]
