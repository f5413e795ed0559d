"""``invert --buckets``, and training on its shards, through the command lines."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from smpo_common.errors import UserError
from smpo_pipeline.images.buckets import bucket_sizes, choose_size
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.jobs.invert import actor as invert_unit
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.models import describe_model, load_models
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.invert.prepare import prepare_unit, unit_row
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.pairs import image_id, layouts_of, list_pair_files, slice_files
from smpo_schemas.rejects import read_rejects
from smpo_schemas.shards.index import indexed_trajectories
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import decode_sample
from tests.calibration.helpers import write_scores
from tests.command import run_command, run_here
from tests.pictures import encode, picture
from tests.tiny.flow import make_tiny_sd3
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl

SHAPES = [(40, 30), (64, 64), (30, 60), (90, 40), (33, 32), (60, 30)]
"""Width and height of first images; second images have nearly the same shape, except in the last pair."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = []
    for number in range(13):
        width, height = SHAPES[number % len(SHAPES)]
        other = (height, 3 * width) if number == 12 else (width + 2, height)
        rows.append(
            {
                "jpg_0": encode(picture(width, height, seed=number)),
                "jpg_1": encode(picture(*other, seed=number + 50)),
                "caption": ("a cat", "dog", "cat and dog")[number % 3],
                "label_0": 1.0,
                "ranking_id": 100 + number,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    make_tiny_model(folder / "sd")
    make_tiny_xl(folder / "sdxl")
    make_tiny_sd3(folder / "sd35")
    images = [(image_id(row["jpg_0"]), image_id(row["jpg_1"])) for row in rows]
    ids, prompts = [str(row["ranking_id"]) for row in rows], [row["caption"] for row in rows]
    made_up = {"clipscore": np.random.default_rng(0).random((len(rows), 2))}
    write_scores(folder / "scores", made_up, [1.0] * len(rows), prompts, images=images, pair_ids=ids)
    return folder, rows


@pytest.mark.parametrize("trajectories", [1, 2])
def test_a_unit_of_many_shapes_does_not_depend_on_the_batch_size(inputs, trajectories, tmp_path, monkeypatch):
    """The actor, without Ray: pairs keep their order and shapes."""
    folder, rows = inputs
    monkeypatch.setattr(invert_unit.ray, "get", lambda value: value)
    path = folder / "pairs.parquet"
    (unit,) = slice_files(list_pair_files([path]), len(rows), None)
    layouts = layouts_of(list_pair_files([path]))
    table, rejects = prepare_unit(unit, layouts, 0, bucket_sizes(32, 8))
    assert [reject.pair_id for reject in rejects] == ["112"]
    scored = [
        {"pair_id": row["pair_id"], "prompt": row["prompt"], "taste_0": 0.1, "taste_1": 0.2}
        for row in table.to_pylist()
    ]
    made = {}
    for batch_size in (1, 3, 16):
        out = tmp_path / str(batch_size)
        options = InvertOptions(
            pairs=[path],
            scores=folder,
            out=out,
            models={"model": str(folder / "sd"), "buckets": True},
            trajectory={"steps": 2, "trajectories": trajectories},
            storing={"pairs_per_shard": len(rows)},
            running={"batch_size": batch_size, "device": "cpu", "concurrency": 1, "max_reject_rate": 1.0},
        )
        run, table_of_scores = Run(out, "manifest.json", {}), pa.Table.from_pylist(scored)
        run.open(overwrite=False, patterns=())
        model = describe_model(options, *load_models(options))
        actor = InvertActor(options, model, run, table_of_scores, len(rows), 32, WorkLog())
        record = UnitRecord.model_validate_json(actor(unit_row(0, table, []))["record"][0].as_py())
        of_the_model, whole = record.seconds
        assert 0 < of_the_model < whole
        tar = webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False)
        made[batch_size] = (
            record,
            [(member["__key__"], decode_sample(member["json"], member["safetensors"], "")) for member in tar],
        )
    record, samples = made[16]
    assert [sample.meta.pair_id for _, sample in samples] == [
        row["pair_id"] for row in scored for _ in range(trajectories)
    ]
    shapes = {row["pair_id"]: row["shape"][1:3] for row in table.to_pylist()}
    for _, sample in samples:
        assert [4 * side for side in sample.x0_2Chw.shape[2:]] == shapes[sample.meta.pair_id]
    for other_record, others in (made[1], made[3]):
        assert other_record.buckets == record.buckets
        for (key, sample), (other_key, other) in zip(samples, others, strict=True):
            assert (key, sample.meta) == (other_key, other.meta)
            for tensor, twin in zip(sample.tensors().values(), other.tensors().values(), strict=True):
                torch.testing.assert_close(tensor.double(), twin.double(), rtol=2e-3, atol=5e-4, equal_nan=True)


def test_a_worker_whose_weights_differ_from_the_drivers_stops_the_job(inputs, tmp_path, monkeypatch):
    """As on a node with another copy of the model."""
    folder, _ = inputs
    monkeypatch.setattr(invert_unit.ray, "get", lambda value: value)
    options = InvertOptions(
        pairs=[],
        scores=folder,
        out=tmp_path,
        models={"model": str(folder / "sd")},
        trajectory={"steps": 2},
        storing={"pairs_per_shard": 1},
        running={"batch_size": 1, "device": "cpu", "concurrency": 1, "max_reject_rate": 1.0},
    )
    model = describe_model(options, *load_models(options))
    other = model.model_copy(update={"vae": "another"})
    actor = InvertActor(options, other, Run(tmp_path, "manifest.json", {}), pa.table({}), 1, 32, WorkLog())
    with pytest.raises(UserError, match="--model .*--inverting-unet, --vae"):
        actor(pa.table({"unit": [0]}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd35"])
def test_from_images_of_many_shapes_to_a_trained_model(inputs, kind, tmp_path, capfd, here_on_ray):
    folder, rows = inputs
    common = ("--pairs", folder / "pairs.parquet", "--device", "cpu", "--scores", folder / "scores", "--steps", 3)
    flags = ("--model", folder / kind, "--pairs-per-shard", 7, "--buckets")
    job = ("--batch-size", 4, "--concurrency", 1, "--out", tmp_path / "shards")
    job += ("--max-reject-rate", 0.1)  # one of thirteen pairs
    done = here_on_ray("smpo-pipeline", "invert", *common, *flags, *job)
    assert done.returncode == 0, done.stderr
    assert "image sizes, height x width: 40 x 24 (17%), 32 x 32" in done.stdout

    directory = ShardDirectory(tmp_path / "shards")
    manifest, samples = directory.manifest, list(directory.samples())
    assert [reject.kind for reject in read_rejects(tmp_path / "shards" / "rejected.parquet")] == [
        "aspect ratios too different"
    ]
    sizes = bucket_sizes(32, 8)
    wanted = {}
    for row in rows[:-1]:
        images = [decode_image(row[f"jpg_{index}"]) for index in range(2)]
        wanted[str(row["ranking_id"])] = images, choose_size(images, sizes)
    assert [sample.meta.pair_id for sample in samples] == list(wanted)
    for sample, trajectory in zip(samples, indexed_trajectories(directory), strict=True):
        images, (height, width) = wanted[sample.meta.pair_id]
        assert sample.meta.size == tuple((image.height, image.width) for image in images)
        assert trajectory.latent == tuple(sample.x0_2Chw.shape[1:]) == (4, height // 4, width // 4)
    counts = [(bucket.height, bucket.width, bucket.pairs) for bucket in manifest.buckets]
    assert sum(pairs for _, _, pairs in counts) == manifest.totals.pairs == 12
    assert {(height, width): pairs for height, width, pairs in counts} == {
        size: [chosen for _, chosen in wanted.values()].count(size) for _, size in wanted.values()
    }
    if kind == "sd":
        done = run_here(capfd, "smpo-pipeline", "inspect", tmp_path / "shards", "--out", tmp_path / "sheet.png")
        assert done.returncode == 0, done.stderr
        assert "buckets" in done.stdout
        assert "40 x 24 (17%)" in done.stdout
        done = run_here(capfd, "smpo-pipeline", "plan", *common, *flags, "--seconds", 0.1, "--batch-size", 2)
        assert done.returncode == 0, done.stderr
        assert "image sizes, height x width: 40 x 24 (17%)" in done.stdout

    run = tmp_path / "run"
    settings = ("--batch-size", 2, "--max-steps", 6, "--workers", 0, "--warmup-steps", 0, "--lr", "1e-6")
    data = ("--shards", tmp_path / "shards", "--model", folder / kind, "--out", run)
    done = run_command("smpo-train", *data, *settings, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "in groups of 2 states of the same shape" in done.stdout
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The trainer computes each stored reference error again: its sizes, crops and shapes equal those of invert.
    assert losses[0] == pytest.approx(math.log(2), abs=2e-3)
    assert len(losses) == 6
