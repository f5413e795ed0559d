"""The checks' shared inputs: sizes, models, pairs and scores, and results that later checks use."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPConfig

from benchmarks.acceptance.device import Device
from benchmarks.speed.invert import make_scores
from benchmarks.speed.score_programs import build_clip, make_pairs
from benchmarks.speed.shapes import build_model
from smpo_models.family import Conditioning, Family
from smpo_models.loading import load_family
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.jobs.invert import models as invert_models
from smpo_trainer.model import policy

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic", "pyarrow", "numpy")
PROMPT = "a small red circle on a blue background"
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """Sizes of all inputs; the defaults are real sizes.

    Attributes:
        divide: by what widths are divided.
        shallow: whether the models have few layers.
        side: of the latents, by shape.
        clip: of the random ViT-H: parts of its config.
        steps: of a trajectory.
        units, unit: committed by the actor; pairs in each.
        batches: trajectories inverted at once, the last as the actor does.
        xl_pairs: SDXL's, in one unit and batch.
        many: trajectories for which memory is to be too small.
        pairs: of a training step.
        train_steps, stop_after: optimizer steps; after how many a run is stopped.
        bare: pairs of the bare training steps.
        xl_train: pairs of SDXL's step with gradient checkpointing.
        matrix: side of the matrices for the ceiling; other ceilings' arrays shrink with it.
        score_side, score_pairs: of the images that are scored, and how many pairs.
        score_batch: images of a call of ViT-H.
        threads: of the reward's actor; children: that decode.
        sampling: steps, prompts and images a prompt of an evaluation.
        plan_seconds: for which `plan` measures.
    """

    divide: int = 1
    shallow: bool = False
    side: dict[str, int] = field(default_factory=lambda: {"sd15": 64, "sdxl": 128})
    clip: dict[str, Any] = field(
        default_factory=lambda: {
            "projection_dim": 1024,
            "text_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "projection_dim": 1024, "hidden_act": "gelu",
            },
            "vision_config": {
                "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
                "projection_dim": 1024, "hidden_act": "gelu", "patch_size": 14, "image_size": 224,
            },
        }
    )  # fmt: skip
    steps: int = 9
    units: int = 2
    unit: int = 32
    batches: tuple[int, ...] = (8, 16, 32)
    xl_pairs: int = 16
    many: int = 64
    pairs: int = 8
    train_steps: int = 10
    stop_after: int = 5
    bare: tuple[int, ...] = (8, 16, 32)
    xl_train: int = 4
    matrix: int = 8192
    score_side: int = 1024
    score_pairs: int = 64
    score_batch: int = 64
    threads: tuple[int, ...] = (2, 4, 8, 16)
    children: tuple[int, ...] = (1, 8, 16)
    sampling: tuple[int, int, int] = (10, 4, 2)
    plan_seconds: float = 15.0


_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = Size(
    divide=8,
    shallow=True,
    side={"sd15": 8, "sdxl": 8},
    clip={
        "projection_dim": 32,
        "text_config": {**_TOWER, "projection_dim": 32},
        "vision_config": {**_TOWER, "projection_dim": 32, "patch_size": 14, "image_size": 28},
    },
    steps=2,
    unit=2,
    batches=(1, 2),
    xl_pairs=1,
    many=4,
    pairs=2,
    train_steps=3,
    stop_after=2,
    bare=(2,),
    xl_train=1,
    matrix=64,
    score_side=64,
    score_pairs=2,
    score_batch=2,
    threads=(1, 2),
    children=(1,),
    sampling=(1, 1, 1),
    plan_seconds=0.5,
)
SIZES = {"full": Size(), "tiny": TINY}


@dataclass
class World:
    """The state of an acceptance run.

    Attributes:
        device: what it runs on.
        size: how large things are.
        work: a folder for models, shards and runs.
        out: where results go.
        notes: what checks leave for later ones: ceilings, rates, losses.
    """

    device: Device
    size: Size
    work: Path
    out: Path
    notes: dict[str, Any] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _others: Future[None] | None = None

    def describe(self) -> dict[str, Any]:
        """Device and versions."""
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        return {**self.device.describe(), "Python": platform.python_version(), "versions": versions}

    def model(self, shape: str) -> Path:
        """The folder of a model."""
        if shape != "sd15":
            if self._others is None:
                raise RuntimeError("SDXL and ViT-H were not made")
            self._others.result()
        return self.work / shape

    def wait_for_others(self) -> None:
        """Wait for the thread that writes SDXL and ViT-H, if there is one."""
        wait([each for each in (self._others,) if each])

    def make_first_model(self) -> None:
        """Write SD 1.5, pairs and scores."""
        self._build("sd15").save_pretrained(self.work / "sd15")
        self.pairs("sd15", self.size.units * self.size.unit)

    def make_others(self) -> None:
        """Draw SDXL and ViT-H, and write them in a thread.

        They are not drawn in the thread: while a model loads in this process, every thread's new parameters are empty.
        """
        pipeline = self._build("sdxl")
        parts = build_clip(CLIPConfig(**self.size.clip), 0, device=self.device.name, dtype=torch.float16)

        def write() -> None:
            pipeline.save_pretrained(self.work / "sdxl")
            for part in parts:
                part.save_pretrained(self.work / "clip")

        self._others = self._pool.submit(write)

    def _build(self, shape: str) -> DiffusionPipeline:
        how = {"device": self.device.name, "dtype": torch.float16, "shallow": self.size.shallow}
        return build_model(shape, self.size.divide, self.size.side[shape], **how)

    def pixels(self, shape: str) -> int:
        """Side of a shape's images."""
        return 8 * self.size.side[shape]

    def pairs(self, shape: str, count: int) -> Path:
        """Write a Parquet file of this many JPEG pairs of a shape's size, and its ``scores``."""
        folder = self.work / f"pairs-{shape}-{count}"
        if not folder.is_dir():
            folder.mkdir()
            path = make_pairs(folder / "pairs.parquet", count, self.pixels(shape))
            make_scores(folder / "scores", captions(path))
        return folder

    def load(self, shape: str, parts: Sequence[str] = ("denoiser", "text", "vae")) -> Family:
        """Load a model in float32 on the device."""
        return load_family(str(self.model(shape)), parts, device=self.device.name)


def captions(pairs: Path) -> list[str]:
    """Captions of a Parquet file of pairs."""
    return pq.read_table(pairs, columns=["caption"])["caption"].to_pylist()


def random_pair(number: int, height: int, width: int) -> PreparedPair:
    """Make a pair of two noise images."""
    stream = np.random.default_rng(number)
    return PreparedPair(
        pair_id=str(number), prompt=PROMPT, label=1.0, annotator=None, scores={"pickscore": (0.3, 0.7)},
        pixels_2HW3=stream.integers(0, 256, (2, height, width, 3), dtype=np.uint8),
        size=((height, width),) * 2, crop=((0, 0),) * 2, measured=False,
    )  # fmt: skip


def conditioned(world: World, family: Family, shape: str, rows: int) -> Conditioning:
    """Encode one prompt, repeated for this many rows."""
    side = world.pixels(shape)
    with torch.no_grad():
        return family.condition([PROMPT] * rows, [(side, side)] * rows, [(0, 0)] * rows)


def latents(world: World, shape: str, *count: int) -> torch.Tensor:
    """Draw the same Gaussian latents each time, float32 on the device."""
    side = world.size.side[shape]
    stream = torch.Generator().manual_seed(0)
    return torch.randn(*count, 4, side, side, generator=stream).to(world.device.name)


@contextmanager
def known_fingerprints() -> Iterator[None]:
    """Fingerprint weights by class and shapes only: hashing SDXL takes ten seconds each time."""

    def fingerprint(*modules: nn.Module) -> str:
        words = [f"{type(module).__name__} {sum(p.numel() for p in module.parameters())}" for module in modules]
        return hashlib.sha256(" ".join(words).encode()).hexdigest()

    with (
        patch.object(invert_models, "fingerprint_module", fingerprint),
        patch.object(policy, "fingerprint_module", fingerprint),
    ):
        yield
