from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from smpo_pipeline.images.decode import ImageRejectedError, decode_image
from smpo_pipeline.images.decoder import PAUSES, Decoder
from tests.pictures import all_kinds, encode, picture
from tests.poison import CRASHES, FILLS_MEMORY, HANGS, OOM_KILLED, write_poisoned_decoder


@pytest.fixture
def poisonous(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_poisoned_decoder(tmp_path / "site"))


def test_the_child_decodes_as_this_process_does():
    decoder = Decoder()
    for kind, data in all_kinds().items():
        mine = decoder.decode(data)
        assert mine.dtype == np.uint8
        np.testing.assert_array_equal(mine, np.asarray(decode_image(data)), err_msg=kind)
    for bad in (b"nonsense", b"", encode(picture(200, 200))[:500]):
        with pytest.raises(ImageRejectedError) as in_process:
            decode_image(bad)
        with pytest.raises(ImageRejectedError) as in_child:
            decoder.decode(bad)
        assert str(in_child.value) == str(in_process.value)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would be made."""
    made = []
    monkeypatch.setattr("smpo_pipeline.images.decoder.time", SimpleNamespace(sleep=made.append))
    return made


def test_a_file_that_crashes_the_decoder_is_rejected_and_the_next_is_decoded(poisonous, pauses):
    decoder = Decoder()
    with pytest.raises(ImageRejectedError, match="crashed the decoder: it ended with SIGSEGV, 3 times"):
        decoder.decode(CRASHES)
    assert pauses == []
    assert decoder.decode(encode(picture())).shape == (30, 40, 3)


@pytest.mark.slow
def test_a_file_that_hangs_the_decoder_is_rejected_in_time(poisonous):
    decoder = Decoder(seconds=1)
    with pytest.raises(ImageRejectedError, match="decoder hangs: no image after 1 s, 3 times"):
        decoder.decode(HANGS)
    assert decoder.decode(encode(picture())).shape == (30, 40, 3)


def test_the_death_of_an_idle_child_rejects_no_image(pauses):
    decoder = Decoder()
    decoder.decode(encode(picture()))
    decoder._child.kill()
    decoder._child.wait()
    assert decoder.decode(encode(picture())).shape == (30, 40, 3)


@pytest.mark.parametrize(("data", "ended"), [(OOM_KILLED, "SIGKILL"), (FILLS_MEMORY, "status 1")])
def test_pauses_grow_after_lack_of_memory(poisonous, pauses, data, ended):
    decoder = Decoder()
    with pytest.raises(ImageRejectedError, match=f"crashed the decoder: it ended with {ended} .too little memory"):
        decoder.decode(data)
    assert pauses == list(PAUSES)
    assert pauses[0] < pauses[1]
    assert decoder.decode(encode(picture())).shape == (30, 40, 3)


def test_lack_of_memory_for_a_moment_rejects_no_image(poisonous, monkeypatch, tmp_path):
    """The file is fine; memory is available again after the first pause."""
    monkeypatch.setenv("MEMORY_IS_SHORT", str(tmp_path / "short"))
    (tmp_path / "short").touch()
    comes_back = SimpleNamespace(sleep=lambda _: (tmp_path / "short").unlink())
    monkeypatch.setattr("smpo_pipeline.images.decoder.time", comes_back)
    assert Decoder().decode(encode(picture(), "PNG")).shape == (30, 40, 3)
