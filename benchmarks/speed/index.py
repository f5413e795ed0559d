"""Measure listing the states of a large data set before the first step; writes a section of docs/results/benchmarks.md.

A synthetic ``index.parquet`` of --trajectories trajectories of nine states and two rewards, in shards of 1000, is
listed as `smpo-train` does, in a separate process: seconds, and peak memory above that of the imports.

    python -m benchmarks.speed.index [--trajectories 1000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.page import stamp, write_section
from smpo_common.files import sha256_file
from smpo_schemas.frozen import StoredFile
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    Manifest,
    ModelInfo,
    ShardEntry,
    Totals,
    write_manifest,
)
from smpo_schemas.preference import find_preference
from smpo_schemas.scoring.scores import RewardStatistics
from smpo_schemas.shards.index import INDEX_FILE, INDEX_SCHEMA
from smpo_trainer.data.state_table import index_states
from smpo_trainer.objectives import find_objective
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.shards.shard_set import open_shards

PER_SHARD, STATES = 1000, 9
REWARDS = ("pickscore", "clipscore")
WORDS = (
    "small",
    "large",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "photo",
    "painting",
    "sunset",
    "cat",
    "dog",
    "tree",
)


def make(path: Path, trajectories: int) -> None:
    """Write an index and a manifest without tars."""
    stream = np.random.default_rng(0)
    with pq.ParquetWriter(path / INDEX_FILE, INDEX_SCHEMA, compression="zstd") as writer:
        for start in range(0, trajectories, PER_SHARD):
            words = stream.choice(WORDS, (PER_SHARD, 12))
            scores = stream.random((PER_SHARD, 2, 2)).tolist()
            timesteps = np.sort(stream.integers(1, 999, (PER_SHARD, STATES))).tolist()
            rows = [
                {
                    "shard": start // PER_SHARD, "key": f"{start + number:08d}", "meta_offset": 512 + number * 170_000,
                    "meta_bytes": 400, "tensors_offset": 1536 + number * 170_000, "tensors_bytes": 165_000,
                    "meta": json.dumps({
                        "pair_id": f"{(start + number) * 7919:016x}", "trajectory": 0, "flipped": False,
                        "prompt": " ".join(words[number]), "prompt_dropped": number % 5 == 0, "label": 1.0,
                        "annotator": "someone", "scores": dict(zip(REWARDS, scores[number], strict=True)),
                        "size": [[512, 512]] * 2, "crop": [[0, 0]] * 2,
                    }),
                    "timesteps": timesteps[number], "latent": [4, 64, 64],
                }
                for number in range(min(PER_SHARD, trajectories - start))
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
    statistics = RewardStatistics(
        model="none", fingerprint="none", unit="none", min=0, max=1, mean=0.5, std=0.3, agreement=None, num_labelled=0
    )
    shards = [
        ShardEntry(name=f"shard-{number:06d}.tar", pairs=PER_SHARD, samples=PER_SHARD, states=PER_SHARD * STATES,
                   bytes=PER_SHARD * 170_000, sha256="0" * 64)
        for number in range(trajectories // PER_SHARD)
    ]  # fmt: skip
    index = StoredFile(name=INDEX_FILE, bytes=(path / INDEX_FILE).stat().st_size, sha256=sha256_file(path / INDEX_FILE))
    write_manifest(path, Manifest(
        schema_version=MANIFEST_VERSION,
        model=ModelInfo(id="none", kind="sd15", prediction_type="epsilon", reference="0",
                        inverting_denoiser="0", text="0", vae="0",
                        scheduler="0", num_train_timesteps=1000),
        resolution=512, inversion=InversionSettings(), seed=0, rewards=dict.fromkeys(REWARDS, statistics),
        shards=shards, index=index,
        totals=Totals(pairs_in=trajectories, pairs=trajectories, samples=trajectories, states=trajectories * STATES,
                      rejected=0, bytes=1),
        rejected_reasons={}, health=[], versions={}, ref_error_arithmetic="fp32",
    ))  # fmt: skip


def measure(path: Path) -> None:
    """List the states; print seconds, and the peak memory in GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    shards = open_shards([str(path)], path)
    kind = find_objective("smpo")
    objective = kind(kind.Options.parse("smpo", {}, beta=2000.0, gamma=10.0, num_train_timesteps=1000))
    statistics = shards.reward_statistics()
    preference = find_preference("minmax")(dict.fromkeys(REWARDS, 1.0), statistics, None)
    mix = RewardMix(preference, statistics, {}, None, None)
    table = index_states(shards, objective, mix, None, (None, None), say=print)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": peak - before, "states": len(table)}))


def main() -> None:
    """Make the index, list it in a separate process, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.trajectories)
        command = [sys.executable, "-m", __spec__.name, "--measure", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        size = (Path(folder) / INDEX_FILE).stat().st_size / 2**20
    text = stamp(
        f"python -m benchmarks.speed.index --trajectories {arguments.trajectories}",
        ("torch", "numpy", "pyarrow", "pydantic"),
    )
    found_text = (
        f"Before its first step, a trainer lists the states of {arguments.trajectories:,} trajectories\n"
        f"({found['states']:,} states, an index of {size:.0f} MiB) in {found['seconds']:.0f} s on one core. Memory "
        f"peaks {found['gib']:.2f} GiB above that of the imports.\n"
        "The machine was shared with other work, which affects the seconds but not the memory."
    )
    write_section("Listing the states", f"{text}\n\n{found_text}")


if __name__ == "__main__":
    main()
