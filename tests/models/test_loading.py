from __future__ import annotations

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.process import START, VariancePreserving
from smpo_schemas.errors import UserError
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_one_model_in_two_dtypes_has_one_fingerprint(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").half()
    unet.save_pretrained(tmp_path / "half")
    unet.float().save_pretrained(tmp_path / "full")
    half, full = (load_family(str(folder), ("denoiser",), denoiser=tmp_path / name) for name in ("half", "full"))
    own = load_family(str(folder), ("denoiser",)).denoiser
    assert fingerprint_module(half.denoiser) == fingerprint_module(full.denoiser) != fingerprint_module(own)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_an_incomplete_checkpoint_is_refused(tmp_path, part):
    folder = make_tiny_model(tmp_path / "model")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    tensors.pop(min(tensors))
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_family(str(folder))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_family(str(folder))


def test_missing_parts_and_foreign_models_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_family(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no denoiser"):
        load_family(str(folder), ("denoiser",), denoiser=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="is a FluxPipeline; known: StableDiffusionPipeline"):
        load_family(str(tmp_path))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_process_by_hand(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, set_alpha_to_one=False)
    process = VariancePreserving(scheduler)
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t_B = torch.tensor([0, 500, 999])
    a = scheduler.alphas_cumprod.double()[t_B].sqrt().reshape(-1, 1, 1, 1)
    s = (1 - a**2).sqrt()
    x_t = process.noised(x0, noise, t_B)
    torch.testing.assert_close(x_t, a * x0 + s * noise)
    target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction_type]
    torch.testing.assert_close(process.target(x0, noise, t_B), target)
    torch.testing.assert_close(process.noise_in(target, x_t, t_B), noise)
    first, _ = process.levels(torch.tensor([START]), x0)
    torch.testing.assert_close(first.flatten(), scheduler.alphas_cumprod[:1].double().sqrt())
    one, zero = VariancePreserving(DDIMScheduler(set_alpha_to_one=True)).levels(torch.tensor([START]), x0)
    assert (float(one), float(zero)) == (1, 0)
    assert process.fingerprint() != VariancePreserving(DDIMScheduler(beta_start=0.001)).fingerprint()
