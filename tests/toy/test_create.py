"""Create a tiny world: its files, its reproducibility, and the errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.toy.annotators import ANNOTATORS
from smpo_pipeline.toy.create import ASSETS, PAIR_SCHEMA, create_world
from smpo_pipeline.toy.sampling import load_pipeline, sample_images
from smpo_pipeline.toy.world import SPLITS, captions_of

NUM_PAIRS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("worlds") / "world"
    create_world(out, num_pairs=NUM_PAIRS, seed=3)
    return out


@pytest.mark.slow
def test_files(world: Path) -> None:
    assert sorted(path.name for path in world.iterdir()) == ["model", "pairs", "prompts", "rewards", "world.json"]
    for split in SPLITS:
        text = (world / "prompts" / f"{split}.txt").read_text(encoding="utf-8")
        assert text.splitlines() == captions_of(split)
    about = json.loads((world / "world.json").read_text(encoding="utf-8"))
    assert (about["num_pairs"], about["seed"]) == (NUM_PAIRS, 3)
    assert 0 < about["mean_true_reward"] < 1


def test_pairs_are_valid(world: Path) -> None:
    table = pq.read_table(world / "pairs")
    assert table.schema.remove_metadata() == PAIR_SCHEMA
    rows = table.to_pylist()
    assert [row["ranking_id"] for row in rows] == list(range(NUM_PAIRS))
    for row in rows:
        assert row["caption"] in captions_of("train")
        assert row["label_0"] in (0, 0.5, 1)
        assert row["label_0"] + row["label_1"] == 1
        assert row["best_image_uid"] == {1: row["image_0_uid"], 0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert 0 <= row["user_id"] < len(ANNOTATORS)
        for name in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[name]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert len({row["image_0_uid"] for row in rows} | {row["image_1_uid"] for row in rows}) == 2 * NUM_PAIRS


@pytest.mark.slow
def test_same_seed_same_world(world: Path, tmp_path: Path) -> None:
    create_world(tmp_path / "again", num_pairs=NUM_PAIRS, seed=3)
    name = "pairs/train-00000-of-00001.parquet"
    assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
    assert (tmp_path / "again" / "world.json").read_bytes() == (world / "world.json").read_bytes()


def test_a_world_of_the_flow_base(world: Path, tmp_path: Path) -> None:
    create_world(tmp_path / "flow", num_pairs=2, seed=3, family="sd3")
    pairs, others = (pq.read_table(folder / "pairs").to_pylist()[0] for folder in (tmp_path / "flow", world))
    assert pairs["caption"] == others["caption"]
    assert pairs["jpg_0"] != others["jpg_0"]
    index = json.loads((tmp_path / "flow/model/model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    with pytest.raises(UserError, match="family sd3, not sd15"):
        create_world(tmp_path / "flow", num_pairs=2, seed=3)


def test_another_seed_makes_other_pairs(world: Path, tmp_path: Path) -> None:
    create_world(tmp_path / "other", num_pairs=2, seed=4)
    first = pq.read_table(world / "pairs").to_pylist()[0]
    assert pq.read_table(tmp_path / "other" / "pairs").to_pylist()[0]["jpg_0"] != first["jpg_0"]


def test_a_picture_does_not_depend_on_its_batch() -> None:
    pipeline, captions, seeds = load_pipeline(ASSETS / "model"), captions_of("train")[:5], [5, 6, 7, 8, 9]
    together = sample_images(pipeline, captions, seeds, num_steps=4, batch_size=5)
    for batch_size in (1, 3):
        apart = sample_images(pipeline, captions, seeds, num_steps=4, batch_size=batch_size)
        assert np.abs(apart.astype(int) - together).max() <= 1


def test_a_finished_world_is_left_alone(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    create_world(world, num_pairs=NUM_PAIRS, seed=3)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_world_with_other_settings_is_refused(world: Path) -> None:
    with pytest.raises(UserError, match="num_pairs 8, not 9"):
        create_world(world, num_pairs=9, seed=3)


@pytest.mark.slow
def test_an_interrupted_world_is_replaced(tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_world(tmp_path, num_pairs=1, progress=interrupt)
    assert not (tmp_path / "world.json").exists()
    create_world(tmp_path, num_pairs=1)
    assert (tmp_path / "world.json").exists()
    assert not (tmp_path / "unfinished").exists()


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "model" / "mine.bin"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(UserError, match="not part of a toy world.*--out"):
        create_world(tmp_path, num_pairs=1)
    assert precious.exists()


@pytest.mark.parametrize(("num_pairs", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_settings_are_refused(tmp_path: Path, num_pairs: int, seed: int) -> None:
    with pytest.raises(UserError, match="at least 1 pair"):
        create_world(tmp_path / "world", num_pairs=num_pairs, seed=seed)


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        create_world(tmp_path / "file" / "world", num_pairs=1)
