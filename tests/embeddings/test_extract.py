"""Embeddings of pairs, against the model itself; killed, continued, rejected."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from smpo_common.errors import UserError
from smpo_pipeline.embeddings import extract
from smpo_pipeline.embeddings.clip import load_clip
from smpo_pipeline.embeddings.extract import Extractor
from smpo_pipeline.embeddings.options import EmbeddingOptions
from smpo_pipeline.embeddings.store import join
from smpo_pipeline.images.decode import decode_image
from smpo_schemas.pairs import ReadingChoices
from tests.embeddings.helpers import make_pairs, tinted
from tests.tiny.stable_diffusion import make_tiny_clip

KINDS = [(0, 1), (1, 1), (0, 0), (1, 0), (0, 1)]
PROMPTS = ["a cat", "a dog", "a cat", "two cats and a dog", ""]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(f"clipscore={make_tiny_clip(tmp_path_factory.mktemp('clip'))}", "cpu")


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(tmp_path / "pairs", KINDS, [1.0] * 5, PROMPTS)


def extractor(clip, folder, reward=None, **options):
    return Extractor(clip, reward, "test", "cpu", folder, EmbeddingOptions(**options))


def test_equals_the_model_one_image_at_a_time(clip, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "_UNIT_ROWS", 2)
    found = extractor(clip, tmp_path / "out", clip, batch_size=3)([pairs], ReadingChoices())
    assert list(found.prompts) == PROMPTS
    assert found.rows() == {f"p{number}": number for number in range(5)}
    model, source = CLIPModel.from_pretrained(clip.model).eval(), clip.model
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(source), CLIPTokenizer.from_pretrained(source)
    for row, kinds in enumerate(KINDS):
        with torch.no_grad():
            text = model.get_text_features(**tokenizer(PROMPTS[row], return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(found.text_RD[row], text, atol=1e-5)
        for side, kind in enumerate(kinds):
            image = decode_image(tinted(kind, 2 * row + side))
            pixels = processor(np.asarray(image), input_data_format="channels_last", return_tensors="pt")
            with torch.no_grad():
                expected = model.get_image_features(**pixels).pooler_output[0]
            np.testing.assert_allclose(found.image_R2D[row, side], expected, atol=1e-5)
            assert found.score_R2[row, side] == pytest.approx(clip.score([image], [PROMPTS[row]])[0], abs=1e-5)
    assert found.image_R2D.std(axis=(0, 1)).max() > 0.01


def test_a_killed_run_continues_and_a_finished_one_is_read(clip, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "_UNIT_ROWS", 2)
    whole = extractor(clip, tmp_path / "whole")([pairs], ReadingChoices())
    embedded = []
    embed = type(clip).embed

    def counted(self, pixels, prompts):
        embedded.append(list(prompts))
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed(self, pixels, prompts)

    monkeypatch.setattr(type(clip), "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        extractor(clip, tmp_path / "killed")([pairs], ReadingChoices())
    found = extractor(clip, tmp_path / "killed")([pairs], ReadingChoices())
    assert len(embedded) == 4  # unit 0 once; unit 1, killed, twice; unit 2
    again = extractor(clip, tmp_path / "killed")([pairs], ReadingChoices())
    assert len(embedded) == 4
    for each in (found, again):
        np.testing.assert_array_equal(each.image_R2D, whole.image_R2D)
        np.testing.assert_array_equal(each.text_RD, whole.text_RD)
    assert found.score_R2 is None


def test_bad_pairs_are_rejected(clip, pairs, tmp_path):
    rows = pq.read_table(pairs).to_pylist()
    rows[1]["image_1"] = b"nonsense"
    rows[2]["prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    found = extractor(clip, tmp_path / "out")([pairs], ReadingChoices())
    assert list(found.pair_ids) == ["p0", "p3", "p4"]
    assert [(each.pair_id, each.stage, each.kind) for each in found.rejects] == [
        ("p1", "test", "image not readable"),
        ("p2", "test", "no prompt"),
    ]
    ids = found.image_ids_R2
    other = np.array([ids[0], ids[1], ids[2], ids[2][::-1], ids[0]])
    pair_ids, prompts = ["p3", "p1", "nowhere", "p4", "p0"], [PROMPTS[3], "", "", "", "x"]
    places, rejects = join(pair_ids, prompts, other, found, "s", "weigh")
    assert places.tolist() == [-1, -1, -1, -1, -1]
    assert [each.kind for each in rejects] == [
        "other images", "image not readable", "images missing", "other images", "other pair",
    ]  # fmt: skip
    places, rejects = join(["p4", "p0"], ["", "a cat"], ids[[2, 0]], found, "s", "weigh")
    assert (places.tolist(), rejects) == ([2, 0], [])
    rows = [row | {"image_0": b"x"} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    with pytest.raises(UserError, match="--pairs: no pair could be embedded; the first: "):
        extractor(clip, tmp_path / "none")([pairs], ReadingChoices())
