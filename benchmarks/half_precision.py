"""What half precision does to scores: writes its section of docs/benchmarks.md.

The embedded world's reward models score its pairs in float32 and by autocast in bf16 and fp16.

    python benchmarks/half_precision.py [--pairs demo/world/pairs]

A minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from page import stamp, write_section

from smpo_pipeline.jobs.chunks import cut_chunks, scores_of
from smpo_pipeline.jobs.ledger import Counts
from smpo_pipeline.jobs.prepare import read_ranges
from smpo_pipeline.jobs.score_units import RewardActor
from smpo_schemas.pairs import column_names, list_pair_files, resolve_columns, slice_files

REWARDS = Path(__file__).parents[1] / "pipeline/smpo_pipeline/toy/assets/rewards"
NAMES = ("pickscore", "clipscore")


def scores(pairs: Path, name: str, dtype: str) -> np.ndarray:
    """float64 [P, 2]."""
    actor = RewardActor(f"{name}={REWARDS / name}", "cpu", dtype, batch_size=32, ledger=Counts(), last=False)
    files = list_pair_files([pairs])
    columns = {file.path: resolve_columns(column_names(file.path), {}, file.path) for file in files}
    found = []
    for unit, ranges in enumerate(slice_files(files, 128, None)):
        rows = read_ranges(ranges, [columns[part.path] for part in ranges])
        found += [scores_of(actor(chunk), name) for chunk in cut_chunks(unit, rows)]
    return np.concatenate(found)


def lines(pairs: Path) -> Iterator[str]:
    """The section's text."""
    yield "The embedded world's reward models on its pairs; half precision by `--dtype`, on CPU: a GPU rounds"
    yield "alike but sums in another order, and there was none to measure it. `apart` is the difference from float32 in"
    yield "standard deviations of the reward's scores; `turned` the share of pairs whose order turns."
    yield ""
    yield "| reward | --dtype | pairs | apart, median | apart, largest | turned |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in NAMES:
        exact = scores(pairs, name, "fp32")
        order = np.sign(exact[:, 0] - exact[:, 1])
        for dtype in ("bf16", "fp16"):
            rounded = scores(pairs, name, dtype)
            apart = np.abs(rounded - exact) / exact.std()
            turned = 100 * np.mean(np.sign(rounded[:, 0] - rounded[:, 1]) != order)
            yield f"| {name} | {dtype} | {len(exact)} | {np.median(apart):.4f} | {apart.max():.4f} | {turned:.2f} % |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("demo/world/pairs"))
    pairs = parser.parse_args().pairs
    text = stamp("python benchmarks/half_precision.py", ("torch", "transformers"))
    write_section("Scores in half precision", "\n".join([text, "", *lines(pairs)]))


if __name__ == "__main__":
    main()
