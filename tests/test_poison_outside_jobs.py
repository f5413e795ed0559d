"""``inspect`` and ``plan`` decode in the command itself; a file that crashes the decoder must not end them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.inspection.pairs import draw_pairs, summarise_pairs
from smpo_pipeline.planning.sample import sample_pairs
from smpo_schemas.pairs import ReadingChoices, list_pair_files
from tests.pictures import encode, picture
from tests.poison import CRASHES, write_poisoned_decoder

REASON = "crashed the decoder: it ended with SIGSEGV"


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_poisoned_decoder(tmp_path / "site"))
    worker_decoder.cache_clear()
    good = encode(picture(64, 64), "PNG")
    rows = [{"prompt": "a", "image_0": good, "image_1": CRASHES}, {"prompt": "b", "image_0": good, "image_1": good}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    yield tmp_path / "pairs.parquet"
    worker_decoder.cache_clear()


def test_inspect_rejects_the_file_and_shows_the_rest(pairs):
    summary = summarise_pairs(pairs, ReadingChoices(), limit=None, samples=2, advance=lambda *_: None)
    (reject,) = summary.rejects
    assert REASON in reject.reason
    assert len(summary.headers) == 2  # of the pair that is left
    assert draw_pairs(summary, pairs, {}).width > 64


def test_plan_samples_the_other_pairs(pairs):
    sampled = sample_pairs(list_pair_files([pairs]), [(32, 32)], count=8, limit=None, rewards=[])
    assert [pair.prompt for pair in sampled.pairs] == ["b"]
    assert sampled.rows == 2
