"""Small pairs, scores and shards to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_pipeline.toy.world import all_scenes, random_centre, render
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    BandHealth,
    Manifest,
    ModelInfo,
    Totals,
    write_manifest,
)
from smpo_schemas.rejects import Reject, write_rejects
from smpo_schemas.scoring.scores import (
    SCORES_VERSION,
    RewardStatistics,
    ScoresInfo,
    reward_statistics,
    write_part,
    write_scores_info,
)
from smpo_schemas.shards.samples import Sample, SampleMeta
from smpo_schemas.shards.writer import ShardWriter

LABELS = (1.0, 0.0, 0.5, None)


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def make_pairs(path: Path, count: int = 10) -> Path:
    """Pick-a-Pic columns; row 1 has a truncated image, row 2 a CMYK and a grey one; prompts 3 and 4 are odd."""
    rng = np.random.default_rng(0)
    scenes = all_scenes()
    rows = []
    for number in range(count):
        scene = scenes[int(rng.integers(len(scenes)))]
        images = [Image.fromarray(render(scene, random_centre(scene, rng))) for _ in range(2)]
        data = [encode(images[0], "JPEG"), encode(images[1], "PNG")]
        if number == 1:
            data[1] = data[1][: len(data[1]) // 2]
        if number == 2:
            data = [encode(images[0].convert("CMYK"), "JPEG"), encode(images[1].convert("L"), "PNG")]
        prompt = {3: "", 4: "ein " + "sehr " * 500 + "großer Bär, Größe Ω"}.get(number, scene.caption)
        rows.append(
            {
                "caption": prompt,
                "jpg_0": data[0],
                "jpg_1": data[1],
                "label_0": LABELS[number % 4],
                "ranking_id": number,
                "user_id": number % 3,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_scores(directory: Path, count: int = 40) -> Path:
    """Two rewards: ``sharp`` orders 3 of 4 pairs as ``match`` does, ``match`` always as the label.

    The columns ``model_0`` and ``model_1`` are no reward's.
    """
    rng = np.random.default_rng(1)
    labels = np.array([1.0 if number % 2 else 0.0 for number in range(count)])
    gap = rng.uniform(0.05, 0.2, count) * np.where(labels == 1, 1, -1)
    match = np.stack([0.5 + gap / 2, 0.5 - gap / 2], axis=1)
    sharp = np.where(np.arange(count)[:, None] % 4 == 0, 1 - match, match)
    rows = [
        {
            "pair_id": str(number),
            "prompt": "p",
            "label": float(labels[number]),
            "annotator": f"user-{number % 2}",
            "model_0": "some",
            "model_1": "other",
            **{
                f"{name}_{side}": scores[number, side]
                for name, scores in (("match", match), ("sharp", sharp))
                for side in (0, 1)
            },
        }
        for number in range(count)
    ]
    directory.mkdir(parents=True)
    part = write_part(directory / "scores-000000.parquet", rows, ["match", "sharp"], ["model_0", "model_1"])
    rejects = [Reject(pair_id="x", source="a.parquet:7", stage="score", reason="image not readable: cut short")]
    write_rejects(directory / "rejected.parquet", rejects)
    statistics = {
        name: reward_statistics(scores, labels, model=f"models/{name}", fingerprint="f", unit="cosine")
        for name, scores in (("match", match), ("sharp", sharp))
    }
    info = ScoresInfo(schema_version=SCORES_VERSION, rewards=statistics, parts=[part], scored=count, rejected=1)
    write_scores_info(directory, info)
    return directory


def make_shards(directory: Path, model: Path, family: Family, ratios: tuple[float, ...] = (1.0,) * 5) -> Path:
    """Six trajectories of forward noise of rendered scenes in one tar, with the given noise ratio in each band."""
    rng = np.random.default_rng(2)
    torch.manual_seed(0)
    scenes = all_scenes()
    with ShardWriter(directory / "shard-000000.tar") as writer:
        for number in range(6):
            scene = scenes[int(rng.integers(len(scenes)))]
            pixels = np.stack([render(scene, random_centre(scene, rng)) for _ in range(2)])
            mean, _ = family.posterior(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
            timestep = torch.tensor([int(t) for t in np.linspace(60, 940, 9)]) + number
            noise = torch.randn(9, 1, *mean.shape[1:]).expand(9, 2, *mean.shape[1:])
            meta = SampleMeta(
                pair_id=f"pair-{number}",
                trajectory=0,
                flipped=number % 2 == 0,
                prompt=scene.caption,
                prompt_dropped=number == 3,
                label=1.0,
                annotator=None,
                scores={"match": (0.1 * number, 0.3)},
                size=((32, 32), (32, 32)),
                crop=((0, 0), (0, 0)),
            )
            residual = torch.linspace(0.01, 0.05, 9)[:, None].expand(9, 2).contiguous()
            sample = Sample(meta, mean.half(), noise.half(), timestep, torch.rand(9, 2), residual)
            writer.write(f"{number:08d}", sample)
    entry = writer.entry
    statistics = RewardStatistics(
        model="m", fingerprint="f", unit="cosine", min=0, max=0.5, mean=0.2, std=0.1, agreement=None, num_labelled=0
    )
    health = [
        BandHealth(
            start=200 * band,
            stop=200 * (band + 1),
            states=12,
            noise_ratio=ratio,
            residual=0.02,
            neighbour_correlation=0.1,
        )
        for band, ratio in enumerate(ratios)
    ]
    write_manifest(
        directory,
        Manifest(
            schema_version=MANIFEST_VERSION,
            model=ModelInfo(
                id=str(model),
                kind="sd15",
                prediction_type="epsilon",
                reference="r" * 64,
                inverting_denoiser="r" * 64,
                text="t",
                vae=fingerprint_module(family.vae),
                scheduler=family.noise_schedule.fingerprint(),
                num_train_timesteps=1000,
            ),
            resolution=32,
            inversion=InversionSettings(),
            seed=0,
            rewards={"match": statistics},
            shards=[entry],
            totals=Totals(pairs_in=7, pairs=6, samples=6, states=54, rejected=1, bytes=entry.bytes),
            rejected_reasons={"image not readable": 1},
            health=health,
            versions={},
            ref_error_arithmetic="fp32",
        ),
    )
    return directory
