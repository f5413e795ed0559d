"""Measure what must not change the numbers of a training run: writes docs/results/invariance.md.

Compares variants with one plain run on the demo's model and shards, step by step.

    make demo
    python -m benchmarks.experiments.invariance --demo demo

Two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.experiments.experiment import head
from benchmarks.page import RESULTS, ROOT, stamp, write_page

PAGE = RESULTS / "invariance.md"
TITLE = "What does not change the numbers of a training run"
STEPS = 20
PLAIN = {"device": "cpu", "batch-size": 8, "workers": 0, "reference": "stored"}
VARIANTS = {
    "batch 1, accumulated 8 times": {"batch-size": 1, "grad-accum": 8},
    "2 processes (gloo), batch 4": {"batch-size": 4},
    "`--gradient-checkpointing`": {"gradient-checkpointing": None},
    "`--workers 4`": {"workers": 4},
    "`--reference live`": {"reference": "live"},
}
METRICS = ("loss", "grad_norm")


def train(demo: Path, out: Path, processes: int, options: dict[str, object]) -> np.ndarray:
    """Train; returns the compared metrics of each step, float64 [STEPS, 2]."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    flags = {
        "shards": demo / "shards", "model": demo / "world/model", "out": out, "reward": "pickscore", "beta": 300,
        "lr": 5e-5, "warmup-steps": 5, "max-steps": STEPS, **PLAIN, **options,
    }  # fmt: skip
    given = [text for name, value in flags.items() for text in (f"--{name}", *([] if value is None else [value]))]
    command = [sys.executable, *launch, "-m", "smpo_trainer", *given]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in METRICS] for line in lines])


def row(label: str, found_S2: np.ndarray, plain_S2: np.ndarray) -> str:
    """Make a table row: largest and mean difference of the loss, and relative difference of the gradient norm."""
    apart_S2 = np.abs(found_S2 - plain_S2) / np.stack([np.ones(STEPS), plain_S2[:, 1]], axis=1)
    cells = [
        f"{value:.1e}" if value else "0" for n in (0, 1) for value in (apart_S2[:, n].max(), apart_S2[:, n].mean())
    ]
    return f"| {' | '.join((label, *cells))} |"


def main() -> None:
    """Train all variants, compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of world and shards")
    demo: Path = parser.parse_args().demo.resolve()
    with tempfile.TemporaryDirectory() as folder:
        plain_S2 = train(demo, Path(folder, "plain"), 1, {})
        rows = [
            row(label, train(demo, Path(folder, str(n)), 2 if "processes" in label else 1, options), plain_S2)
            for n, (label, options) in enumerate(VARIANTS.items())
        ]
    losses, norms = plain_S2.T
    libraries = ("torch", "diffusers", "accelerate", "numpy")
    text = f"""{stamp("python -m benchmarks.experiments.invariance", libraries, cores=1)}

The embedded world's base model, {STEPS} steps of 8 pairs in float32 on CPU (SmPO, beta 300, learning rate 5e-5 after 5
steps of warm-up), against one process with `--batch-size 8 --workers 0 --reference stored`, whose losses are
{losses.min():.3f} to {losses.max():.3f} and whose gradient norms are {norms.min():.2f} to {norms.max():.2f}. The table
has the largest and the mean difference over the steps; for gradient norms it is relative. Sums in another order differ
by rounding, which later steps build on; `0` means equal bits.

{head("variant", "loss, max", "loss, mean", "gradient norm, max", "gradient norm, mean")}
{chr(10).join(rows)}"""
    write_page(PAGE, TITLE, text)


if __name__ == "__main__":
    main()
