"""Train Stable Diffusion XL on shards of the inverter, and load the result with stock diffusers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family, load_tuned_denoiser
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import make_tiny_xl
from tests.trainer.conftest import Train
from tests.trainer.helpers import column, with_stored_text, write_shards


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_xl(tmp_path_factory.mktemp("models") / "xl")


CONDITIONED = {"sizes": ("image", "model"), "one size": ("constant", "model"), "encoded": ("image", "encoded")}
"""``--size-conditioning`` and ``--empty-prompt``."""


@pytest.fixture(scope="module", params=CONDITIONED)
def xl_shards(request: pytest.FixtureRequest, xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs whose images have different sizes and crops."""
    sizes, empty = CONDITIONED[request.param]
    family = load_family(str(xl))
    family.encodes_empty_prompt = empty == "encoded"
    settings = InversionSettings(steps=3, size_conditioning=sizes, prompt_dropout=0.4, empty_prompt=empty)
    inverter = Inverter(family, family.denoiser, settings, seed=0)
    pairs = [
        dataclasses.replace(
            make_pair(number),
            scores={"taste": (0.1 * number, 0.3)},
            size=((32 + 700 * number, 32), (9, 300)),
            crop=((5 * number, 0), (0, 500)),
        )
        for number in range(6)
    ]
    samples, _ = inverter.invert([(pair, 0) for pair in pairs])
    assert {sample.meta.prompt_dropped for sample in samples} == {True, False}
    directory = tmp_path_factory.mktemp("shards") / "xl"
    directory.mkdir()
    write_shards(directory, xl, samples, ["taste"], empty_prompt=empty)
    return directory


default = pytest.mark.parametrize("xl_shards", ["sizes"], indirect=True)


@pytest.mark.slow
def test_the_first_loss_is_ln_2_and_the_unet_loads(train: Train, xl: Path, xl_shards: Path) -> None:
    """The trainer reproduces the stored reference errors, so sizes, crops and prompts are the same."""
    out = train(on=xl_shards, base=xl, max_steps=3, batch_size=6, lr=1e-3)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    picture = generate(StableDiffusionXLPipeline.from_pretrained(xl, unet=unet))
    assert not np.array_equal(picture, generate(StableDiffusionXLPipeline.from_pretrained(xl)))


@pytest.mark.slow
@default
def test_a_lora_loads_and_inverts(train: Train, xl: Path, xl_shards: Path) -> None:
    out = train(on=xl_shards, base=xl, max_steps=3, batch_size=6, lr=1e-2, lora_rank=4)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl)
    base = generate(pipeline)
    pipeline.load_lora_weights(out)
    assert not np.array_equal(generate(pipeline), base)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    family = load_family(str(xl))
    inverting_denoiser = load_tuned_denoiser(family, str(xl), out, f"--inverting-unet {out}")
    assert fingerprint_module(inverting_denoiser) != fingerprint_module(family.denoiser)
    for name, expected in pipeline.unet.state_dict().items():
        torch.testing.assert_close(inverting_denoiser.state_dict()[name], expected)


def generate(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("xl_shards", "dtype"), [("sizes", "fp32"), ("sizes", "bf16"), ("encoded", "fp32")], indirect=["xl_shards"]
)
def test_stored_text_equals_live_to_the_bit(
    train: Train, xl: Path, xl_shards: Path, tmp_path: Path, dtype: str
) -> None:
    options = {"base": xl, "dtype": dtype, "max_steps": 2}
    live = train("live", on=xl_shards, **options)
    stored = train("stored", on=with_stored_text(xl_shards, xl, tmp_path / "shards", dtype), **options)
    for name in ("loss", "grad_norm"):
        assert column(stored, name) == column(live, name)


@pytest.mark.slow
@default
def test_validation_images_are_drawn(train: Train, xl: Path, xl_shards: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    drawing = {"image_prompts": prompts, "image_sampling_steps": 2}
    out = train(on=xl_shards, base=xl, max_steps=1, dtype="bf16", **drawing)
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-000000.png", "step-000001.png"]
