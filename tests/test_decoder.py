from __future__ import annotations

import numpy as np
import pytest

from smpo_pipeline.decoder import Decoder
from smpo_pipeline.images import ImageRejectedError, decode_image
from tests.pictures import all_kinds, encode, picture
from tests.poison import CRASHES, HANGS, write_poisoned_decoder


@pytest.fixture
def poisonous(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_poisoned_decoder(tmp_path / "site"))


def test_the_child_decodes_as_this_process_does():
    decoder = Decoder()
    for kind, data in all_kinds().items():
        mine = decoder.decode(data)
        assert mine.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(decode_image(data)), err_msg=kind)
    for bad in (b"nonsense", b"", encode(picture(200, 200))[:500]):
        with pytest.raises(ImageRejectedError) as here:
            decode_image(bad)
        with pytest.raises(ImageRejectedError) as there:
            decoder.decode(bad)
        assert str(there.value) == str(here.value)


def test_a_file_that_crashes_the_decoder_is_rejected_and_the_next_is_decoded(poisonous):
    decoder = Decoder()
    with pytest.raises(ImageRejectedError, match="crashed the decoder: it ended with SIGSEGV, 3 times"):
        decoder.decode(CRASHES)
    assert decoder.decode(encode(picture())).size == (40, 30)


def test_a_file_that_hangs_the_decoder_is_rejected_in_time(poisonous):
    decoder = Decoder(seconds=1)
    with pytest.raises(ImageRejectedError, match="decoder hangs: no image after 1 s, 3 times"):
        decoder.decode(HANGS)
    assert decoder.decode(encode(picture())).size == (40, 30)


def test_a_child_that_dies_of_something_else_costs_no_image():
    decoder = Decoder()
    decoder.decode(encode(picture()))
    decoder._child.kill()
    decoder._child.wait()
    assert decoder.decode(encode(picture())).size == (40, 30)
