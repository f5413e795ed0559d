from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from smpo_common.errors import UserError
from smpo_models.draws import image_noise
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import latent_shape, load_generator
from tests.evaluation.stubs import EvaluationMaker


def test_noise_depends_on_seed_prompt_and_index_alone() -> None:
    noise = image_noise(0, "a cat", 1, (4, 8, 8)).numpy()
    assert np.array_equal(noise, image_noise(0, "a cat", 1, (4, 8, 8)))
    for other in ((1, "a cat", 1), (0, "a dog", 1), (0, "a cat", 2)):
        assert abs(np.corrcoef(noise.ravel(), image_noise(*other, (4, 8, 8)).numpy().ravel())[0, 1]) < 0.2
    many = image_noise(3, "Über 猫", 0, (4, 128, 128)).numpy()
    assert many.dtype == np.float32
    assert abs(many.mean()) < 0.01
    assert many.std() == pytest.approx(1, abs=0.01)


def test_models_begin_from_the_same_noise(plan_of: EvaluationMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = plan_of()
    seen: dict[str, list[np.ndarray]] = {}
    for model in evaluation.models:
        generator = load_generator(model, evaluation.base, "cpu", "fp32")
        inner = generator.denoiser.forward
        noises = seen.setdefault(model.name, [])
        monkeypatch.setattr(generator.denoiser, "forward", _recording(inner, noises))
        generator.sample([("a cat", index) for index in range(3)], evaluation.settings)
        assert latent_shape(generator.family, evaluation.settings) == (4, 8, 8)
    assert np.array_equal(seen["base"][0], seen["tuned"][0])
    assert np.array_equal(seen["base"][0][1], image_noise(0, "a cat", 1, (4, 8, 8)))
    assert not np.array_equal(seen["base"][1], seen["tuned"][1])


def _recording(inner: Callable[..., Any], noises: list[np.ndarray]) -> Callable[..., Any]:
    def forward(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        noises.append(sample.numpy().copy())
        return inner(sample, *arguments, **options)

    return forward


def test_images_do_not_depend_on_batch_size_or_order(plan_of: EvaluationMaker) -> None:
    evaluation = plan_of()
    generator = load_generator(evaluation.models[0], evaluation.base, "cpu", "fp32")
    keys = [(prompt, index) for prompt in ("a cat", "a dog and a cat") for index in range(3)]
    made = []
    for batch_size, order in ((1, keys), (4, keys), (6, keys[::-1])):
        images = {}
        for start in range(0, 6, batch_size):
            batch = order[start : start + batch_size]
            images |= dict(zip(batch, generator.sample(batch, evaluation.settings), strict=True))
        made.append([np.asarray(images[key].image, int) for key in keys])
    for others in made[1:]:
        # float32 sums in another order may move a value over a rounding step of the PNG
        assert max(np.abs(a - b).max() for a, b in zip(made[0], others, strict=True)) <= 1


def test_ddim_without_clipping_whatever_the_scheduler(models: dict[str, Path]) -> None:
    (model,) = parse_models([f"base={models['base']}"])
    pipeline = load_generator(model, None, "cpu", "fp32", sampler="ddim").pipeline
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.config["clip_sample"] is False
    assert pipeline.safety_checker is None


def test_a_model_without_a_size_takes_the_one_that_is_given(
    plan_of: EvaluationMaker, models: dict[str, Path], tmp_path: Path
) -> None:
    sizeless = shutil.copytree(models["base"], tmp_path / "sizeless")
    config = sizeless / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    images = []
    for source, resolution in ((models["base"], None), (sizeless, 32)):
        evaluation = plan_of(model=[f"base={source}"], resolution=resolution)
        (model,) = evaluation.models
        assert latent_shape(evaluation.families["base"], evaluation.settings) == (4, 8, 8)
        (sampled,) = load_generator(model, None, "cpu", "fp32").sample([("a cat", 0)], evaluation.settings)
        images.append(sampled.image.tobytes())
    assert images[0] == images[1]
    with pytest.raises(UserError, match="--resolution"):
        plan_of(model=[f"base={sizeless}"])
