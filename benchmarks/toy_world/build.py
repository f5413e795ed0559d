"""Trains the world's checkpoints: ``python -m benchmarks.toy_world.build --out DIR`` (about 25 minutes on two cores).

The package ships such a result: the same code and settings, but run stage by stage with other seeds for the base's
rounds, so that a build gives a world of the same kind and not the shipped bytes.

Every stage draws from its own seed and from what the stages before it wrote, so a build that was interrupted continues
where it stopped. On one machine, with one number of threads and one set of library versions, two builds are meant to
be equal bit for bit; elsewhere sums round differently and training drifts apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from benchmarks.toy_world.autoencoder import train_autoencoder
from benchmarks.toy_world.base import train_base
from benchmarks.toy_world.flow_base import train_flow_base
from benchmarks.toy_world.rewards import TASTES, SampledPairs, image_processor, train_matcher, train_taste
from benchmarks.toy_world.tokenizer import build_tokenizer
from benchmarks.toy_world.training import Report
from smpo_common.files import write_json
from smpo_pipeline.toy.sampling import load_pipeline, sample_images
from smpo_pipeline.toy.world import captions_of

AUTOENCODER_STEPS = 1500
BASE_ROUNDS = ((2000, 1e-3), (1200, 6e-4))
"""Steps and learning rates. Short on purpose: a base that is right nearly always leaves nothing to align."""

FLOW_ROUND = (4000, 2e-3)
"""The same of the flow base."""

FLOW_STAGE = 6
"""Seed; the rewards have those before it."""

MATCHER_STEPS = 300
TASTE_STEPS = 200
REWARD_PAIRS = 1200


def build(out: Path, report: Report = print) -> None:
    """Trains what is not there yet and writes it, in float16, to ``out/model`` and ``out/rewards/NAME``."""
    if not (out / "model" / "vae" / "config.json").exists():
        rng = _begin_stage(0)
        train_autoencoder(rng, AUTOENCODER_STEPS, report).half().save_pretrained(out / "model" / "vae")
    if not (out / "model" / "model_index.json").exists():
        vae = AutoencoderKL.from_pretrained(out / "model" / "vae", dtype=torch.float32)
        rng = _begin_stage(1)
        train_base(vae, build_tokenizer(), rng, BASE_ROUNDS, report).to(torch.float16).save_pretrained(out / "model")
    if not (out / "model-sd3" / "model_index.json").exists():
        vae = AutoencoderKL.from_pretrained(out / "model" / "vae", dtype=torch.float32)
        pipeline = train_flow_base(vae, build_tokenizer(), _begin_stage(FLOW_STAGE), *FLOW_ROUND, report)
        pipeline.to(torch.float16).save_pretrained(out / "model-sd3")
    pipeline = load_pipeline(out / "model")
    if not all((out / "rewards" / name / "config.json").exists() for name in TASTES):
        _build_rewards(out / "rewards", pipeline, report)
    _forget_paths(out)


def _build_rewards(out: Path, pipeline: StableDiffusionPipeline, report: Report) -> None:
    tokenizer = pipeline.tokenizer
    matcher = train_matcher(pipeline.vae, tokenizer, _begin_stage(2), MATCHER_STEPS, report)
    pairs = _sample_pairs(pipeline, _begin_stage(3))
    report(f"sampled {len(pairs.captions)} pairs")
    for stage, (name, tastes) in enumerate(TASTES.items(), start=4):
        clip = train_taste(matcher, tokenizer, tastes, pairs, _begin_stage(stage), TASTE_STEPS, report)
        _save_reward(clip, tokenizer, out / name)


def _begin_stage(seed: int) -> np.random.Generator:
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def _sample_pairs(pipeline: StableDiffusionPipeline, rng: np.random.Generator) -> SampledPairs:
    captions = [str(caption) for caption in rng.choice(captions_of("train"), size=REWARD_PAIRS)]
    seeds = rng.integers(2**62, size=(2, REWARD_PAIRS)).tolist()
    images_0, images_1 = (sample_images(pipeline, captions, part) for part in seeds)
    return SampledPairs(captions, images_0, images_1)


def _save_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """In PickScore's layout: a CLIPModel with the files of its CLIPProcessor beside it."""
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def _forget_paths(out: Path) -> None:
    """Removes this machine's paths from the configurations."""
    for path in out.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            write_json(path, content)


def main() -> None:
    """Reads the command line and builds."""
    parser = argparse.ArgumentParser(description="Train the checkpoints of the embedded world.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and rewards/")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (part of what makes a build repeatable)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    build(arguments.out, report)


if __name__ == "__main__":
    main()
