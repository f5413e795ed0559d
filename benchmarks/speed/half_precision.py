"""Measure what half precision does to scores; writes a section of docs/results/benchmarks.md.

The embedded world's reward models, and small random ones of the other rewards, score its pairs in float32 and by
autocast in bf16 and fp16.

    python -m benchmarks.speed.half_precision [--pairs demo/world/pairs]

A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.tiny.rewards import make_tiny_aesthetic, make_tiny_hpsv2, make_tiny_image_reward

from benchmarks.page import ROOT, stamp, write_section
from smpo_pipeline.jobs.reading import read_unit
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import cut_chunks, pair_scores
from smpo_pipeline.rewards import load_reward
from smpo_schemas.pairs import layouts_of, list_pair_files, slice_files

TOY = ROOT / "pipeline/smpo_pipeline/toy/assets/rewards"
RANDOM = {"hpsv2": make_tiny_hpsv2, "imagereward": make_tiny_image_reward, "aesthetic": make_tiny_aesthetic}


def scores(pairs: Path, name: str, model: Path, dtype: str) -> np.ndarray:
    """Score all pairs: float64 [P, 2]."""
    spec = f"{name}={model}"
    fingerprint = load_reward(spec, "cpu").fingerprint
    actor = RewardActor(spec, fingerprint, "cpu", dtype, batch_size=32, work_log=WorkLog(), share=1, last=False)
    files = list_pair_files([pairs])
    layouts = layouts_of(files)
    found = []
    for unit, ranges in enumerate(slice_files(files, 128, None)):
        rows = read_unit(ranges, layouts)
        found += [pair_scores(actor(chunk), name) for chunk in cut_chunks(unit, rows)]
    return np.concatenate(found)


def lines(pairs: Path, folder: Path) -> Iterator[str]:
    """The section's text."""
    yield "Reward models on the embedded world's pairs: its own two (trained), and small random ones (two layers) for"
    yield "the other rewards, in half precision by `--dtype` on a CPU. A GPU rounds alike but sums in another order;"
    yield "that was not measured. `apart` is the difference from float32 in standard deviations of the reward's scores;"
    yield "`turned` is the share of pairs whose order changes."
    yield ""
    yield "| reward | model | --dtype | pairs | apart, median | apart, largest | turned |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    models = {name: ("trained", TOY / name) for name in ("pickscore", "clipscore")}
    models |= {name: ("random", make(folder / name)) for name, make in RANDOM.items()}
    for name, (kind, model) in models.items():
        exact = scores(pairs, name, model, "fp32")
        order = np.sign(exact[:, 0] - exact[:, 1])
        for dtype in ("bf16", "fp16"):
            rounded = scores(pairs, name, model, dtype)
            apart = np.abs(rounded - exact) / exact.std()
            turned = 100 * np.mean(np.sign(rounded[:, 0] - rounded[:, 1]) != order)
            cells = (name, kind, dtype, len(exact), f"{np.median(apart):.4f}", f"{apart.max():.4f}", f"{turned:.2f} %")
            yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("demo/world/pairs"))
    pairs = parser.parse_args().pairs
    text = stamp("python -m benchmarks.speed.half_precision", ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        write_section("Scores in half precision", "\n".join([text, "", *lines(pairs, Path(folder))]))


if __name__ == "__main__":
    main()
