from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from smpo_common.errors import UserError
from smpo_pipeline.inspection.pairs import print_pairs, summarise_pairs
from smpo_pipeline.inspection.scores import print_scores, reward_agreement, summarise_scores
from smpo_pipeline.inspection.shards import print_shards, summarise_shards
from smpo_schemas.manifest import read_manifest, write_manifest
from smpo_schemas.pairs import ReadingChoices
from smpo_schemas.scoring.scores import label_agreement
from tests.inspection.helpers import make_pairs, make_scores


def ignore(done: int, total: int) -> None:
    assert done <= total


def printed(show, summary, path: Path) -> str:
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(summary, path, console)
    return console.export_text()


def test_pairs(tmp_path: Path) -> None:
    path = make_pairs(tmp_path / "pairs.parquet")
    summary = summarise_pairs(path, ReadingChoices(), limit=None, samples=4, advance=ignore)
    assert (summary.files, summary.rows, summary.rows_read) == (1, 10, 10)
    assert summary.labels == {"image_0": 3, "image_1": 3, "tie": 2, "none": 2}
    assert summary.annotators == {"0": 4, "1": 3, "2": 3}
    assert [reject.pair_id for reject in summary.rejects] == ["1"]
    assert sorted(header.mode for header in summary.headers).count("CMYK") == 1
    assert len(summary.headers) == 18
    assert [pair.pair_id for pair in summary.chosen] == ["0", "3", "6", "9"]
    text = printed(print_pairs, summary, path)
    assert "9 pairs; 1 would be rejected" in text
    assert "image_0 3 (30.0 %)" in text
    assert "image not readable" in text


def test_pairs_limit(tmp_path: Path) -> None:
    path = make_pairs(tmp_path / "pairs.parquet")
    summary = summarise_pairs(path, ReadingChoices(), limit=3, samples=12, advance=ignore)
    assert (summary.rows, summary.rows_read, len(summary.chosen)) == (10, 3, 3)


def test_pairs_without_the_named_column(tmp_path: Path) -> None:
    path = make_pairs(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="no column 'text'"):
        summarise_pairs(path, ReadingChoices({"prompt": "text"}), limit=None, samples=1, advance=ignore)


def test_pairs_of_chosen_and_rejected(tmp_path: Path) -> None:
    path = make_pairs(tmp_path / "pairs.parquet")
    given = {"chosen": "jpg_0", "rejected": "jpg_1"}
    summary = summarise_pairs(path, ReadingChoices(given), limit=None, samples=1, advance=ignore)
    assert summary.labels["image_0"] + summary.labels["image_1"] == summary.rows_read
    assert (
        "columns: prompt from caption, pair_id from ranking_id, annotator from user_id, chosen from jpg_0, rejected"
        in (printed(print_pairs, summary, path))
    )


def test_agreement_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    labels = np.array([1.0, 1.0, 0.5, np.nan, 0.0])
    assert label_agreement(scores[:, 0] - scores[:, 1], labels) == (1, 3)
    other = np.array([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert reward_agreement(scores, other) == (1, 3)


def test_scores(tmp_path: Path) -> None:
    path = make_scores(tmp_path / "scores")
    text = printed(print_scores, summarise_scores(path), path)
    assert "41 in = 40 scored + 1 rejected" in text
    assert "models/match" in text
    (agreement,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["match", "sharp"]]
    assert agreement == ["match", "sharp", "40", "75.0", "%"]
    (first,) = [line.split() for line in text.splitlines() if line.strip().startswith("user-0")]
    assert first == ["user-0", "20", "100.0", "%", "50.0", "%"]


def test_annotators_beyond_the_table_are_the_others(tmp_path: Path) -> None:
    summary = summarise_scores(make_scores(tmp_path / "scores"))
    people = [f"person-{number % 10}" for number in range(36)] + ["late", "late", "later", None]
    text = printed(print_scores, replace(summary, annotators=people), tmp_path)
    assert "and 2 more: late (2), later (1)" in text
    assert text.count("person-3") == 1


def test_shards(shards: Path) -> None:
    summary = summarise_shards(shards, limit=None, samples=2, advance=ignore)
    assert (summary.trajectories, summary.flipped, summary.dropped) == (6, 3, 1)
    assert [sample.meta.pair_id for sample in summary.chosen] == ["pair-0", "pair-5"]
    text = printed(print_shards, summary, shards)
    for words in (
        "7 in = 6 inverted + 1 rejected",
        "6 with 54 states; all read",
        "50.0 %",
        "16.7 %",
        "the reference",
    ):
        assert words in text
    assert "warning" not in text


def test_shards_limit_reads_the_first_trajectories_only(shards: Path) -> None:
    summary = summarise_shards(shards, limit=2, samples=9, advance=ignore)
    assert (summary.trajectories, len(summary.chosen)) == (2, 2)
    assert "the first 2 read" in printed(print_shards, summary, shards)


def test_a_bad_noise_ratio_gives_a_warning(shards: Path, tmp_path: Path) -> None:
    manifest = read_manifest(shards)
    bad = manifest.health[1].model_copy(update={"noise_ratio": 0.5})
    (tmp_path / "shard-000000.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    write_manifest(tmp_path, manifest.model_copy(update={"health": [manifest.health[0], bad, *manifest.health[2:]]}))
    text = printed(print_shards, summarise_shards(tmp_path, limit=None, samples=0, advance=ignore), tmp_path)
    assert "noise ratio 0.50" in text
    assert "--renoise-steps 5" in text


def test_a_damaged_tar_is_one_line(shards: Path, tmp_path: Path) -> None:
    content = bytearray((shards / "shard-000000.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "shard-000000.tar").write_bytes(content)
    write_manifest(tmp_path, read_manifest(shards))
    with pytest.raises(UserError, match="SHA-256"):
        summarise_shards(tmp_path, limit=None, samples=1, advance=ignore)
