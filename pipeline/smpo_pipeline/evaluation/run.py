"""Run an evaluation: generate every model's images, score them with every reward, compare, write the report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smpo_common.errors import UserError
from smpo_models.devices import choose_device, device_in_words, reward_arithmetic
from smpo_models.hub import require_source
from smpo_models.sampling import sampling_in_words
from smpo_models.weights import variant_remark
from smpo_pipeline.evaluation.evaluation import Evaluation
from smpo_pipeline.evaluation.provenance import read_training
from smpo_pipeline.evaluation.report.write import write_report
from smpo_pipeline.evaluation.results import (
    REPORT_FILE,
    RESULTS_FILE,
    RESULTS_VERSION,
    ModelEntry,
    Results,
    RewardEntry,
    find_all,
    write_results,
    write_scores,
)
from smpo_pipeline.generation.generator import quiet_libraries
from smpo_pipeline.generation.source import ModelSource
from smpo_pipeline.images.decode import ImageRejectedError, decode_image
from smpo_pipeline.isolation import run_isolated
from smpo_pipeline.rewards import Reward, checked_scores, load_reward

Scores = dict[str, dict[str, np.ndarray]]
"""Per reward and model, float64 [P, I]: P prompts, I images per prompt."""


Sample = Callable[[Evaluation, ModelSource, str], str]
"""Samples the missing images of a model on a device; returns the fingerprint of its denoiser."""


@dataclass(frozen=True)
class Picture:
    """One image: its prompt, its number within the prompt, and its file."""

    prompt: str
    index: int
    path: Path


def run(evaluation: Evaluation, console: Console, sample: Sample) -> Results:
    """Run the evaluation; existing images of the same settings are reused.

    Raises:
        UserError: a model or a reward cannot be loaded, or a folder cannot be written.
    """
    # On a cluster, this machine may have no GPU.
    device = choose_device(None if evaluation.ray_address and evaluation.device != "cpu" else evaluation.device)
    models = f"models in {evaluation.settings.dtype}, " if evaluation.models else ""
    rewarded = f"{models}rewards in {evaluation.settings.reward_dtype}"
    console.print(f"device: {device_in_words(device)}, {rewarded}", highlight=False)
    quiet_libraries()
    # True float32, as in the workers of `score`: by default cuDNN convolves in TF32.
    torch.backends.cudnn.allow_tf32 = False
    wholes = {evaluation.base: f"--base {evaluation.base}"} if evaluation.base else {}
    wholes |= {
        model.source: f"--model {model.name}={model.source}" for model in evaluation.models if model.kind == "pipeline"
    }
    for whole, what in wholes.items():
        require_source(whole, what)
        if remark := variant_remark(whole, evaluation.settings.variant):
            console.print(remark, highlight=False, soft_wrap=True)
    console.print(_sizes(evaluation), highlight=False, soft_wrap=True)
    if evaluation.repeated:
        console.print(f"--prompts: {evaluation.repeated} rows repeat an earlier prompt, which is taken once")
    # Load the rewards now, so that an error is found before hours of sampling.
    rewards = [load_reward(spec, device) for spec in evaluation.settings.rewards]
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise UserError(f"--reward: two of {', '.join(names)} share a name; evaluate them one at a time")
    for stale in (RESULTS_FILE, REPORT_FILE):
        (evaluation.out / stale).unlink(missing_ok=True)
    entries = [_entry(evaluation, model, sample(evaluation, model, device)) for model in evaluation.models]
    entries += [ModelEntry(name=each.name, source=each.source, base=None, denoiser="") for each in evaluation.folders]
    with _progress(console) as progress:
        scores = {reward.name: _score_all(evaluation, reward, device, progress) for reward in rewards}
    results = _results(evaluation, entries, rewards, scores)
    write_scores(
        evaluation.out,
        scores,
        evaluation.settings,
        {name: _files(evaluation, name) for name in evaluation.names},
    )
    console.print("writing the report and its pictures", highlight=False)
    write_report(
        evaluation.out,
        results,
        scores,
        {name: evaluation.files(name) for name in evaluation.names},
        {model.name: model.metrics for model in evaluation.models if model.metrics},
    )
    write_results(evaluation.out, results)
    return results


def _sizes(evaluation: Evaluation) -> str:
    """Describe the numbers and sizes of images, and how they are sampled, in one line."""
    settings = evaluation.settings
    if not evaluation.models:
        return f"{len(settings.prompts)} prompts x {settings.images_per_prompt} images made elsewhere"
    side = evaluation.generation().resolution
    sampling = sampling_in_words(settings.sampler, settings.steps, settings.guidance_scale)
    images = f"{len(settings.prompts)} prompts x {settings.images_per_prompt} images of {side} x {side} pixels"
    return f"{images}; {sampling}; batch size {evaluation.batch_size}; seed {settings.seed}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _pictures(evaluation: Evaluation, name: str) -> list[Picture]:
    """List all images of a model or a folder, prompt by prompt."""
    per_prompt = evaluation.settings.images_per_prompt
    return [
        Picture(evaluation.settings.prompts[number // per_prompt], number % per_prompt, file)
        for number, file in enumerate(evaluation.files(name))
    ]


def _files(evaluation: Evaluation, name: str) -> list[str]:
    """List a model's images relative to the evaluation's folder or, if they were made elsewhere, as absolute paths."""
    out = evaluation.out
    return [str(file.relative_to(out) if file.is_relative_to(out) else file) for file in evaluation.files(name)]


def _entry(evaluation: Evaluation, model: ModelSource, denoiser: str) -> ModelEntry:
    training, trained_rewards = read_training(model.source)
    return ModelEntry(
        name=model.name,
        source=model.source,
        base=None if model.kind == "pipeline" else evaluation.base,
        denoiser=denoiser,
        negative=model.negative.source if model.negative else None,
        training=training,
        trained_rewards=trained_rewards,
    )


def _score_all(evaluation: Evaluation, reward: Reward, device: str, progress: Progress) -> dict[str, np.ndarray]:
    """Score all images of all models with one reward: per model, float64 [P, I].

    Raises:
        UserError: the reward has no score for an image, or memory is too small for a single image.
    """
    scores: dict[str, np.ndarray] = {}
    shape = (len(evaluation.settings.prompts), evaluation.settings.images_per_prompt)
    run_batch = partial(_score_batch, reward, device, evaluation.settings.reward_dtype)
    for name in evaluation.names:
        pictures = _pictures(evaluation, name)
        task = progress.add_task(f"score {name} with {reward.name}", total=len(pictures))
        values = np.empty(len(pictures))
        for start in range(0, len(pictures), evaluation.batch_size):
            batch = pictures[start : start + evaluation.batch_size]
            outcome = run_isolated(run_batch, batch, device)
            if outcome.failed:
                position, reason = min(outcome.failed.items())
                raise UserError(f"--reward {reward.name}: {batch[position].path} {reason}")
            for positions, batch_scores in outcome.results:
                values[start + np.array(positions)] = batch_scores
            progress.advance(task, len(batch))
        scores[name] = values.reshape(shape)
    return scores


def _score_batch(reward: Reward, device: str, dtype: str, batch: Sequence[Picture]) -> np.ndarray:
    images = [_decoded(picture.path) for picture in batch]
    with reward_arithmetic(device, dtype):
        scored = checked_scores(reward, images, [picture.prompt for picture in batch])
    for position in np.flatnonzero(~np.isfinite(scored.values)).tolist():
        bad, reason = batch[position], scored.reasons.get(position)
        why = f": {reason}" if reason else ""
        raise UserError(f"--reward {reward.name} has no finite score for {bad.path} (prompt {bad.prompt!r}){why}")
    return scored.values


def _decoded(path: Path) -> Image.Image:
    """Decode a file as ``score`` does."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, ImageRejectedError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again: delete it, if evaluate made it") from error


def _results(evaluation: Evaluation, entries: list[ModelEntry], rewards: Sequence[Reward], scores: Scores) -> Results:
    baseline = evaluation.names[0]
    return Results(
        schema_version=RESULTS_VERSION,
        digest=evaluation.settings.digest(),
        settings=evaluation.settings,
        num_prompts=len(evaluation.settings.prompts),
        num_images=len(evaluation.settings.prompts) * evaluation.settings.images_per_prompt,
        baseline=baseline,
        models=entries,
        rewards=[
            RewardEntry(
                name=reward.name,
                unit=reward.unit,
                model=reward.model,
                fingerprint=reward.fingerprint,
                dtype=evaluation.settings.reward_dtype,
            )
            for reward in rewards
        ],
        findings=find_all(scores, baseline),
        versions={name: importlib.metadata.version(name) for name in ("smpo-diffusion", "diffusers", "torch", "numpy")},
    )
