"""Shards with random latents for a tiny model, and the command line in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from smpo_common.errors import UserError
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.jobs.invert.prompts import encode_batches
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    Manifest,
    ModelInfo,
    StoredTextEntry,
    Totals,
    autocast_arithmetic,
    write_manifest,
)
from smpo_schemas.scoring.scores import RewardStatistics
from smpo_schemas.shards.index import write_index
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample, SampleMeta
from smpo_schemas.shards.text import TEXT_INDEX, text_file_name, write_text, write_text_index
from smpo_schemas.shards.writer import ShardWriter
from smpo_trainer.cli import main
from smpo_trainer.model.policy import Policy
from smpo_trainer.output.checkpoints import Checkpoint, Checkpoints
from smpo_trainer.settings import TrainSettings
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import LATENT_SHAPE

PROMPTS = ("a cat", "a dog and a cat", "", "ünïcödé 猫", "a very long prompt " * 20)


class PlainReference:
    """Errors computed directly with diffusers and transformers, sharing no code with the trainer."""

    def __init__(self, model: Path, unet: Path | None = None) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(unet or model / "unet").eval()
        self.text = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(model / "scheduler")

    @torch.no_grad()
    def error(self, x0: torch.Tensor, noise: torch.Tensor, t: int, prompt: str) -> float:
        """Mean squared error at one state of one image (float16 [C, h, w] latents), target in float64."""
        return float(self.error_with_gradient(x0, noise, t, prompt))

    def error_with_gradient(self, x0: torch.Tensor, noise: torch.Tensor, t: int, prompt: str) -> torch.Tensor:
        """As ``error``, float64 [], with the gradient of the denoiser's weights."""
        output, target = self.output_and_target(x0, noise, t, prompt)
        return (output - target).square().mean()

    @torch.no_grad()
    def error_and_norm(self, x0: torch.Tensor, noise: torch.Tensor, t: int, prompt: str) -> tuple[float, float]:
        """As ``error``, and the root mean square of the output."""
        output, target = self.output_and_target(x0, noise, t, prompt)
        return float((output - target).square().mean()), float(output.square().mean().sqrt())

    def output_and_target(
        self, x0: torch.Tensor, noise: torch.Tensor, t: int, prompt: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The denoiser's output and its regression target, float64 [C, h, w]."""
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        text = self.text(tokens.input_ids)[0].detach()
        product = self.scheduler.alphas_cumprod[t].double()
        a, s = product.sqrt(), (1 - product).sqrt()
        x = a * x0.double() + s * noise.double()
        output = self.unet(x.float()[None], t, encoder_hidden_states=text).sample[0].double()
        is_v = self.scheduler.config["prediction_type"] == "v_prediction"
        return output, a * noise.double() - s * x0.double() if is_v else noise.double()


def make_shards(
    directory: Path,
    model: Path,
    *,
    num_pairs: int = 6,
    num_states: int = 3,
    seed: int = 0,
    rewards: Sequence[str] = ("taste",),
    labels: Sequence[float | None] = (1.0, 0.0),
    scores: Sequence[tuple[float, float]] | None = None,
    swapped: bool = False,
    prefix: str = "pair",
    latent: Sequence[int] = LATENT_SHAPE,
    storage: torch.dtype = torch.float16,
) -> Path:
    """Write shards of up to four pairs with random latents and true ref_error and ref_norm.

    Args:
        labels: repeated over the pairs.
        scores: of all rewards, repeated over the pairs; None draws them.
        swapped: with image_0 and image_1, their scores and label exchanged.
    """
    directory.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    reference = PlainReference(model)
    samples = []
    for number in range(num_pairs):
        drawn = {name: tuple(generator.uniform(size=2).tolist()) for name in rewards}
        x0 = torch.from_numpy(generator.standard_normal((2, *latent))).to(storage)
        noise = torch.from_numpy(generator.standard_normal((num_states, 2, *latent))).to(storage)
        timesteps = np.sort(generator.choice(1000, num_states, replace=False))
        prompt, dropped = PROMPTS[number % len(PROMPTS)], number % 4 == 3
        seen = "" if dropped else prompt
        measured = [
            [reference.error_and_norm(x0[i], noise[k, i], int(t), seen) for i in (0, 1)]
            for k, t in enumerate(timesteps)
        ]
        label = labels[number % len(labels)]
        pair_scores = drawn if scores is None else dict.fromkeys(rewards, scores[number % len(scores)])
        ref_error, ref_norm = torch.tensor(measured, dtype=torch.float32).unbind(-1)
        if swapped:
            x0, noise, ref_error, ref_norm = x0.flip(0), noise.flip(1), ref_error.flip(1), ref_norm.flip(1)
            pair_scores = {name: (second, first) for name, (first, second) in pair_scores.items()}
            label = None if label is None else 1 - label
        meta = SampleMeta(
            pair_id=f"{prefix}-{number}",
            trajectory=0,
            flipped=False,
            prompt=prompt,
            prompt_dropped=dropped,
            label=label,
            annotator=None,
            scores=pair_scores,
            size=((32, 32), (32, 32)),
            crop=((0, 0), (0, 0)),
        )
        residual = torch.zeros(num_states, 2)
        samples.append(Sample(meta, x0, noise, torch.from_numpy(timesteps), ref_error, residual, ref_norm))
    write_shards(directory, model, samples, rewards)
    return directory


def write_shards(
    directory: Path,
    model: Path,
    samples: list[Sample],
    rewards: Sequence[str],
    dtype: str = "fp32",
    empty_prompt: str = "model",
    embedded_guidance: float | None = None,
) -> None:
    """Write samples, four per tar, and a manifest for ``model`` and these flags of ``invert``."""
    entries = []
    for shard, start in enumerate(range(0, len(samples), 4)):
        with ShardWriter(directory / f"shard-{shard:06d}.tar") as writer:
            for number, sample in enumerate(samples[start : start + 4], start=start):
                writer.write(f"{number:08d}", sample)
        entries.append(writer.entry)
    family = load_family(str(model))
    statistics = {
        name: RewardStatistics(
            model=f"tiny-{name}", fingerprint=name, unit="cosine", min=0, max=1, mean=0.5, std=0.3,
            agreement=None, num_labelled=0,
        )
        for name in rewards
    }  # fmt: skip
    reference = fingerprint_module(family.denoiser)
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        model=ModelInfo(
            id=str(model),
            kind=family.kind,
            prediction_type=family.noise_schedule.prediction_type,
            reference=reference,
            inverting_denoiser=reference,
            text=fingerprint_module(*family.text_modules),
            vae=fingerprint_module(family.vae),
            scheduler=family.noise_schedule.fingerprint(),
            num_train_timesteps=family.noise_schedule.num_train_timesteps,
            embedded_guidance=embedded_guidance,
        ),
        resolution=32,
        inversion=InversionSettings(dtype=dtype, empty_prompt=empty_prompt),
        ref_error_arithmetic=autocast_arithmetic(dtype),
        has_ref_norm=all(sample.ref_norm_K2 is not None for sample in samples),
        seed=0,
        rewards=statistics,
        shards=entries,
        totals=Totals(
            pairs_in=len(samples),
            pairs=len(samples),
            samples=len(samples),
            states=sum(entry.states for entry in entries),
            rejected=0,
            bytes=sum(entry.bytes for entry in entries),
        ),
        rejected_reasons={},
        health=[],
        versions={},
    )
    index = write_index(ShardDirectory(directory, manifest))
    write_manifest(directory, manifest.model_copy(update={"index": index}))


def invert_tiny(
    model: Path,
    directory: Path,
    guidance: float | None = None,
    recorded: float | None = None,
    reward: str = "taste",
    source: Literal["renoise", "forward"] = "renoise",
) -> Path:
    """Make shards of four pairs, of a model that is told ``guidance``; the manifest says ``recorded``."""
    family = load_family(str(model))
    family.embedded_guidance = guidance or family.embedded_guidance
    settings = InversionSettings(source=source, steps=3, prompt_dropout=0.4)
    inverter = Inverter(family, family.denoiser, settings, seed=0)
    pairs = [
        dataclasses.replace(make_pair(number), scores={reward: (0.1 * number, 0.3)}, label=float(number % 2))
        for number in range(4)
    ]
    samples, _ = inverter.invert([(pair, 0) for pair in pairs])
    directory.mkdir()
    write_shards(directory, model, samples, [reward], embedded_guidance=recorded)
    return directory


def arguments(shards: Path | str | Sequence[Path], model: Path, out: Path, **options: Any) -> list[str]:
    """Command line of a short run; None leaves an option out, True makes a flag without a value."""
    folders = [shards] if isinstance(shards, (Path, str)) else list(shards)
    settings = {"max_steps": 4, "batch_size": 2, "warmup_steps": 0, "lr": 1e-4, "workers": 0, **options}
    words = ["--shards", *map(str, folders), "--model", str(model), "--out", str(out)]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag, str(value)]
    return words


def dying_after(step: int) -> Callable[[Checkpoints, Checkpoint, Policy], Path]:
    """``Checkpoints.save`` that ends the run after saving this step."""
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        path = save(self, checkpoint, policy)
        if checkpoint.step == step:
            raise UserError("power cut")
        return path

    return save_and_die


def collecting(seen: list[dict[str, torch.Tensor]]) -> Callable[[Checkpoints, Checkpoint, Policy], Path]:
    """``Checkpoints.save`` that also collects the weights in training."""
    save = Checkpoints.save

    def save_and_note(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        seen.append({name: tensor.detach().clone() for name, tensor in checkpoint.weights.items()})
        return save(self, checkpoint, policy)

    return save_and_note


def run_cli(monkeypatch: pytest.MonkeyPatch, args: Sequence[str]) -> int:
    """Exit status of ``smpo-train`` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["smpo-train", *args])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def resolve_settings(monkeypatch: pytest.MonkeyPatch, args: Sequence[str]) -> TrainSettings:
    """Parse these arguments of ``smpo-train``, without reading any file."""
    parsed: list[TrainSettings] = []
    with monkeypatch.context() as patch:
        patch.setattr("smpo_trainer.run.run_training", parsed.append)
        assert run_cli(patch, args) == 0
    return parsed[0]


def make_settings(**values: Any) -> TrainSettings:
    """Settings made in Python, with these values of flags."""
    return TrainSettings(shards=("shards",), model="model", out=Path("out")).replace(**values)


def with_manifest(shards: Path, directory: Path, *, kind: str | None = None, **inversion: Any) -> Path:
    """Copy shards, with this model kind and these inversion settings in the manifest."""
    shutil.copytree(shards, directory)
    manifest = ShardDirectory(directory).manifest
    model = manifest.model.model_copy(update={"kind": kind or manifest.model.kind})
    made = manifest.inversion.model_copy(update=inversion)
    write_manifest(directory, manifest.model_copy(update={"model": model, "inversion": made}))
    return directory


def with_stored_text(
    shards: Path, model: Path, directory: Path, dtype: str = "fp32", prompts: Sequence[str] | None = None
) -> Path:
    """Copy shards, and store the text of their prompts, or of these, in files of three, as ``invert --dtype`` does."""
    shutil.copytree(shards, directory)
    opened = ShardDirectory(directory)
    family = load_family(str(model), ("text",))
    family.encodes_empty_prompt = opened.manifest.inversion.empty_prompt == "encoded"
    every = dict.fromkeys(["", *(sample.meta.prompt for sample in opened.samples())])
    chosen = list(every if prompts is None else prompts)
    files = []
    for number, start in enumerate(range(0, len(chosen), 3)):
        some = chosen[start : start + 3]
        path = directory / "text" / text_file_name(number)
        files.append(write_text(path, some, list(chain.from_iterable(encode_batches(family, some, dtype)))))
    index = write_text_index(directory / "text" / TEXT_INDEX, chosen, [False] * len(chosen), 3)
    size = index.bytes + sum(file.bytes for file in files)
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    entry = StoredTextEntry(dtype=name, prompts=len(chosen), bytes=size, index=index, files=files)
    inversion = opened.manifest.inversion.model_copy(update={"text": "stored"})
    write_manifest(directory, opened.manifest.model_copy(update={"text": entry, "inversion": inversion}))
    return directory


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def column(out: Path, name: str) -> list[float]:
    """One metric of all steps."""
    return [line[name] for line in metrics(out)]
