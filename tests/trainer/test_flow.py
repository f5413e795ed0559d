"""Training SD3.5 and FLUX.1 on shards that the inverter made, to what stock diffusers loads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from smpo_models.loading import load_family
from smpo_pipeline.evaluation.generate import load_generator
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.tiny_flow import make_tiny_flux, make_tiny_sd3
from tests.trainer.conftest import Train
from tests.trainer.helpers import column, write_shards

MODELS = {"sd35": make_tiny_sd3, "flux1-dev": make_tiny_flux}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = load_family(str(model))
    inverter = Inverter(family, family.denoiser, InversionSettings(steps=3, prompt_dropout=0.4), seed=0)
    pairs = [
        dataclasses.replace(make_pair(number), scores={"taste": (0.1 * number, 0.3)}, label=float(number % 2))
        for number in range(4)
    ]
    samples, _ = inverter.invert([(pair, 0) for pair in pairs])
    directory = tmp_path_factory.mktemp("shards") / "flow"
    directory.mkdir()
    write_shards(directory, model, samples, ["taste"])
    return directory


@pytest.mark.parametrize("options", [{"objective": "smpo"}, {"objective": "dpo", "lora_rank": 2}], ids=["full", "lora"])
def test_the_first_loss_is_ln_2_and_the_pipeline_loads_the_result(
    train: Train, model: Path, shards: Path, options: dict[str, object]
) -> None:
    """The stored reference errors are what the trainer's own forward finds, at fractional timesteps."""
    out = train(on=shards, base=model, max_steps=3, batch_size=4, lr=1e-3, save_every=3, **options)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    assert column(out, "loss")[-1] != column(out, "loss")[0]
    pipeline = DiffusionPipeline.from_pretrained(model)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    if "lora_rank" in options:
        pipeline.load_lora_weights(str(out))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(out / "transformer")
    after = pipeline.transformer.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".attn.to_q." in name for name in moved)
    for source in (out, out / "checkpoint-000003"):
        tuned = load_generator(*parse_models([f"tuned={source}"]), str(model), "cpu", "fp32")
        assert all(torch.equal(after[name], weight) for name, weight in tuned.denoiser.state_dict().items())
    if "lora_rank" in options:
        targets = load_family(str(model), ()).lora_targets
        assert all(any(f".{target}." in name for target in targets) for name in moved)


def test_validation_images_are_drawn_by_the_models_own_sampler(
    train: Train, model: Path, shards: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    out = train(on=shards, base=model, max_steps=1, batch_size=4, image_prompts=prompts, image_sampling_steps=2)
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-000000.png", "step-000001.png"]
