"""``smpo-pipeline weigh`` as users run it, and what ``smpo-train`` reads of it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_schemas.generation.selection import SelectionInfo, write_selection
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.scoring.weights import read_weights
from smpo_trainer.preference.pair_weights import read_pair_weights
from tests.command import assert_one_line, run_here
from tests.embeddings.helpers import make_pairs, make_scores
from tests.tiny.stable_diffusion import make_tiny_clip

PAIRS = 60
NAMES = ("prompt", "image_0", "image_1")
GOLDEN = [number % 3 == 0 for number in range(PAIRS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CLIP, and pairs: golden ones are reddish, a third of the others too, the rest bluish."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_clip(folder / "clip")
    kinds = [(0, 0) if number % 3 == 0 or number % 9 == 1 else (1, 1) for number in range(PAIRS)]
    make_pairs(folder, kinds, [1.0] * PAIRS, [f"a cat {number % 20}" for number in range(PAIRS)])
    return folder


@pytest.fixture
def weigh(world, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def weigh(scores, *flags, pairs=world / "pairs.parquet"):
        common = ("--pairs", pairs, "--features", f"clipscore={world / 'clip'}", "--device", "cpu")
        where = ("--scores", scores, "--embeddings", world / "embeddings")
        return run_here(capfd, "smpo-pipeline", "weigh", *where, *common, *flags)

    return weigh


def scores_of(world, folder, order=None):
    return make_scores(folder, world / "pairs.parquet", {"golden": GOLDEN, "site": SITES}, order)


SITES = [None if number == 4 else "ab"[number % 2] for number in range(PAIRS)]


def column(scores, name="weight"):
    table = read_scores(scores, read_scores_info(scores))
    return dict(zip(table["pair_id"].to_pylist(), table[name].to_pylist(), strict=True))


def test_golden_looking_pairs_weigh_more_and_training_reads_it(weigh, world, tmp_path):
    scores = scores_of(world, tmp_path / "scores")
    before = read_scores(scores, read_scores_info(scores))
    done = weigh(scores, "--golden-column", "golden")
    assert (done.returncode, done.stderr) == (0, "")
    found, report = column(scores), read_weights(scores)
    alike = [found[f"p{number}"] for number in range(PAIRS) if number % 9 == 1]
    others = [found[f"p{number}"] for number in range(PAIRS) if number % 3 and number % 9 != 1]
    assert np.mean(alike) > 2 * np.mean(others)
    assert np.mean(list(found.values())) == pytest.approx(1, abs=1e-6) == report.mean
    assert (report.golden, report.alpha, report.pairs, report.rejected) == (20, 1 / 3, PAIRS, 0)
    source = report.sources["the others"]
    assert (source.pairs, source.noise) == (40, False)
    assert 0.8 < source.auc < 1
    w = np.array(list(found.values()))
    assert report.effective_size == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-5)
    for shown in (f"{source.auc:.3f}", f"{report.effective_size:.1f} equal ones of 60", "--weight-column weight"):
        assert shown in done.stdout
    assert "noise" not in done.stdout
    # Everything else of the table is as it was, and the trainer takes the column.
    table = read_scores(scores, read_scores_info(scores))
    assert table.drop_columns(["weight"]).equals(before)
    assert [path.name for path in scores.glob("scores-*")] == [read_scores_info(scores).parts[0].name]
    assert read_pair_weights(scores, "weight").table["p7"] == ("a cat 7", found["p7"])


@pytest.mark.slow
def test_row_order_and_a_second_run_change_nothing(weigh, world, tmp_path):
    one, other = scores_of(world, tmp_path / "one"), scores_of(world, tmp_path / "other", reversed(range(PAIRS)))
    for scores in (one, other):
        assert weigh(scores, "--golden-column", "golden").returncode == 0
    assert column(one) == column(other)
    before = {path.name: path.read_bytes() for path in one.glob("*.*")}
    assert weigh(one, "--golden-column", "golden").returncode == 0
    assert {path.name: path.read_bytes() for path in one.glob("*.*")} == before
    assert weigh(one, "--golden-column", "golden", "--no-normalise").returncode == 0
    raw = column(one)
    report, mean = read_weights(one), np.mean(list(raw.values()))
    assert [report.mean, report.unnormalised_mean] == pytest.approx([mean, mean])
    scaled = {pair_id: weight * read_weights(other).unnormalised_mean for pair_id, weight in column(other).items()}
    assert raw == pytest.approx(scaled, rel=1e-5)


@pytest.mark.slow
def test_listed_pairs_are_golden_and_sources_have_their_shares(weigh, world, tmp_path):
    ids = [f"p{number}" for number in range(PAIRS) if GOLDEN[number]]
    (tmp_path / "golden.txt").write_text("\n".join([*ids, "elsewhere"]))
    pq.write_table(pa.table({"pair_id": ids}), tmp_path / "golden.parquet")
    found = []
    for name in ("golden.txt", "golden.parquet"):
        scores = scores_of(world, tmp_path / f"scores-{name}")
        flags = ("--golden", tmp_path / name, "--source-column", "site", "--folds", 2, "--column", "w")
        assert weigh(scores, *flags).returncode == 2  # the only pair without a site
        table = next(scores.glob("scores-0*.parquet"))
        rows = pq.read_table(table).to_pylist()
        pq.write_table(pa.Table.from_pylist([row | {"site": row["site"] or "a"} for row in rows]), table)
        done = weigh(scores, *flags)
        assert (done.returncode, done.stderr) == (0, "")
        found.append(column(scores, "w"))
        sources = read_weights(scores).sources
        assert {name: (each.pairs, each.share) for name, each in sources.items()} == {
            "a": (20, 1 / 3),
            "b": (20, 1 / 3),
        }
    assert found[0] == found[1]


def test_pairs_that_cannot_be_read_have_no_weight(weigh, world, tmp_path):
    rows = pq.read_table(world / "pairs.parquet").to_pylist()
    rows[5]["image_0"] = b"nonsense"
    pq.write_table(pa.Table.from_pylist(rows[:-1]), tmp_path / "pairs.parquet")
    scores = scores_of(world, tmp_path / "scores")
    done = weigh(scores, "--golden-column", "golden", pairs=tmp_path / "pairs.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "58 pairs weighed; 2 rejected" in done.stdout
    found = column(scores)
    assert {pair_id for pair_id, weight in found.items() if weight is None} == {"p5", "p59"}
    rejects = read_rejects(scores / "weights-rejected.parquet")
    assert [(each.pair_id, each.kind) for each in rejects] == [("p5", "image not readable"), ("p59", "images missing")]
    assert read_weights(scores).mean == pytest.approx(1)


def test_a_kill_before_the_report_is_made_good_by_the_same_command(weigh, world, tmp_path):
    scores = scores_of(world, tmp_path / "scores")
    assert weigh(scores, "--golden-column", "golden").returncode == 0
    before = {path.name: path.read_bytes() for path in scores.glob("*.*")}
    (scores / "weights.json").unlink()
    assert weigh(scores, "--golden-column", "golden").returncode == 0
    assert {path.name: path.read_bytes() for path in scores.glob("*.*")} == before


def test_a_column_of_weights_leaves_the_table_what_was_scored(weigh, world, tmp_path):
    """So that `invert` and `select` continue on it."""
    scores = scores_of(world, tmp_path / "scores")
    before = [part.content for part in read_scores_info(scores).parts]
    for flags in ((), ("--no-normalise",)):
        assert weigh(scores, "--golden-column", "golden", *flags).returncode == 0
        parts = read_scores_info(scores).parts
        assert [part.content for part in parts] == before != [part.sha256 for part in parts]


def test_of_a_selection_only_the_selected_pairs_are_weighed(weigh, world, tmp_path):
    """Its table has the candidates, too, which are not in its pairs."""
    scores = scores_of(world, tmp_path / "out/scores")
    pairs = pq.read_table(world / "pairs.parquet").slice(0, 30)
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    settings = {"by": "extremes", "rewards": {}, "pairs_per_prompt": 1, "min_gap": None, "dominated_only": False}
    settings |= {"loser": "worst", "seed": 0, "label": True}
    counts = dict.fromkeys(("rows", "images", "prompts", "prompts_with_pairs", "pairs"), 30)
    info = {"schema_version": 1, "version": "0", "settings": settings, "candidates": [], "scores_sha256": "", **counts}
    info |= {"gaps": {"min": 0, "mean": 0, "max": 0}, "rejected": 0, "reasons": {}, "pairs_sha256": ""}
    write_selection(tmp_path / "out", SelectionInfo.model_validate(info))
    done = weigh(scores, "--golden-column", "golden", pairs=tmp_path / "pairs.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "30 pairs, 10 golden" in done.stdout
    assert "30 pairs weighed:" in done.stdout
    assert [weight is None for weight in column(scores).values()] == [False] * 30 + [True] * 30


def test_a_golden_set_like_the_others_is_called_noise(weigh, world, tmp_path):
    scores = make_scores(
        tmp_path / "scores", world / "pairs.parquet", {"g": [number // 3 % 2 for number in range(PAIRS)]}
    )
    done = weigh(scores, "--golden-column", "g")
    assert done.returncode == 0
    assert "AUC near 0.5: golden images and those of the others look alike; these weights are noise" in done.stdout


@pytest.mark.slow
def test_mistakes_are_one_line(weigh, world, tmp_path):
    scores = scores_of(world, tmp_path / "scores")
    before = {path: path.read_bytes() for path in scores.iterdir()}
    (tmp_path / "none.txt").write_text("elsewhere")
    assert_one_line(weigh(scores), "either --golden FILE or --golden-column NAME")
    assert_one_line(weigh(scores, "--golden-column", "gold"), "--golden-column gold: not a column of", "golden")
    assert_one_line(
        weigh(scores, "--golden-column", "label", "--source-column", "x"), "--source-column x: not a column"
    )
    assert_one_line(weigh(scores, "--golden-column", "one_0"), "has the value 2.0; expected true or false, or 1 or 0")
    assert_one_line(weigh(scores, "--golden-column", "label"), "every pair of", "is golden")
    assert_one_line(weigh(scores, "--golden", tmp_path / "none.txt"), "none of its 1 lines is the pair_id")
    golden = ("--golden-column", "golden")
    assert_one_line(weigh(scores, *golden, "--column", "one_0"), "is a column of every scores table")
    assert_one_line(weigh(scores, *golden, "--column", "site"), "weigh did not make it", "--overwrite")
    assert_one_line(weigh(scores, *golden, "--folds", 30), "--folds 30", "there are 20")
    assert_one_line(weigh(scores, *golden, "--features", "hpsv2"), "--features hpsv2: expected clipscore[=MODEL] or")
    assert {path: path.read_bytes() for path in scores.iterdir()} == before
    assert weigh(scores, *golden, "--column", "site", "--overwrite").returncode == 0


@pytest.mark.slow
def test_columns_of_the_pairs_serve_where_the_table_has_none(weigh, world, tmp_path):
    """The table in another order than the pairs."""
    table = pq.read_table(world / "pairs.parquet")
    sites = ["ab"[number % 2] for number in range(PAIRS)]
    table = table.append_column("golden", [GOLDEN]).append_column("site", [sites])
    pq.write_table(table, tmp_path / "pairs.parquet")
    flags = ("--golden-column", "golden", "--source-column", "site")
    expected, scores = tmp_path / "expected", tmp_path / "scores"
    make_scores(expected, world / "pairs.parquet", {"golden": GOLDEN, "site": sites})
    make_scores(scores, world / "pairs.parquet", {}, list(reversed(range(PAIRS))))
    assert weigh(expected, *flags).returncode == 0
    done = weigh(scores, *flags, pairs=tmp_path / "pairs.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    assert column(scores) == pytest.approx(column(expected))
    # From JSON in a folder, in which pair_ids have another name.
    rows = [row | {"id": row.pop("pair_id")} for row in table.select(["pair_id", "golden", "site"]).to_pylist()]
    for number, row in enumerate(pq.read_table(world / "pairs.parquet").to_pylist()):
        for name in ("image_0", "image_1"):
            (tmp_path / f"{number}-{name}.png").write_bytes(row[name])
            rows[number][name] = f"../{number}-{name}.png"
        rows[number]["prompt"] = row["prompt"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = make_scores(tmp_path / "again", world / "pairs.parquet", {})
    assert weigh(again, *flags, "--pair-id-column", "id", pairs=tmp_path / "folder").returncode == 0
    assert column(again) == pytest.approx(column(expected))
    # A file without the column would count as not golden.
    (tmp_path / "folder/more.jsonl").write_text(json.dumps({"id": "more", **{k: rows[0][k] for k in NAMES}}))
    some = weigh(again, *flags, "--pair-id-column", "id", pairs=tmp_path / "folder")
    assert_one_line(some, "--golden-column golden", "more.jsonl has no such column")
    assert "golden" not in read_scores(scores, read_scores_info(scores)).column_names
    assert_one_line(weigh(scores, "--golden-column", "nothing"), "--golden-column nothing: not a column of")
