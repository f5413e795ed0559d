from __future__ import annotations

import shutil
from fractions import Fraction

import pytest
import safetensors.torch
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTokenizer

from smpo_common.errors import UserError
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import families, load_family, load_tuned_denoiser
from smpo_models.noise_schedules.base import START
from smpo_models.noise_schedules.variance_preserving import VariancePreserving
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_vae, make_tiny_xl


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
    with pytest.raises(UserError, match="--model .*nothing"):
        load_family(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no denoiser"):
        load_family(str(folder), ("denoiser",), denoiser=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    with pytest.raises(UserError, match="is a MochiPipeline; known: .*StableDiffusionPipeline"):
        load_family(str(tmp_path))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_noise_schedule_by_hand(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, set_alpha_to_one=False)
    schedule = VariancePreserving(scheduler)
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t_B = torch.tensor([0, 500, 999])
    a = scheduler.alphas_cumprod.double()[t_B].sqrt().reshape(-1, 1, 1, 1)
    s = (1 - a**2).sqrt()
    x_t = schedule.noised(x0, noise, t_B)
    torch.testing.assert_close(x_t, a * x0 + s * noise)
    target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction_type]
    torch.testing.assert_close(schedule.target(x0, noise, t_B), target)
    torch.testing.assert_close(schedule.noise_in(target, x_t, t_B), noise)
    first, _ = schedule.levels(torch.tensor([START, -199]), x0)
    torch.testing.assert_close(first.flatten(), scheduler.alphas_cumprod[[0, 0]].double().sqrt())
    one, zero = VariancePreserving(DDIMScheduler(set_alpha_to_one=True)).levels(torch.tensor([START]), x0)
    assert (float(one), float(zero)) == (1, 0)
    assert schedule.fingerprint() != VariancePreserving(DDIMScheduler(beta_start=0.001)).fingerprint()


@pytest.mark.parametrize("steps", [1, 9, 61, 122, 244, 1000])
def test_a_trailing_grid_has_as_many_timesteps_as_asked_for(steps):
    """By integers alone: T - i T / n for i = 0 .. n - 1, rounded, less 1."""
    grid = VariancePreserving(DDIMScheduler(timestep_spacing="trailing")).grid(steps, 64)
    wanted = [round(Fraction(1000 * (steps - i), steps)) - 1 for i in range(steps)]
    assert grid == wanted[::-1]


def test_prompts_that_are_too_long_are_known(folder):
    family = load_family(str(folder), ("text",))
    longest = 24 - 2  # of the tiny tokenizer's tokens two are the start and the end
    assert not family.cuts("")
    assert not family.cuts("cat " * longest)
    assert family.cuts("cat " * (longest + 1))


def test_stable_diffusion_2_is_known_by_the_width_of_its_text(folder, tmp_path):
    sd2 = load_family(str(make_tiny_model(tmp_path / "sd2", "v_prediction", text_width=1024)))
    assert (load_family(str(folder), ()).kind, sd2.kind) == ("sd15", "sd2")
    assert sd2.noise_schedule.prediction_type == "v_prediction"
    conditioning = sd2.condition(["a cat", ""], [(32, 32)] * 2, [(0, 0)] * 2)
    assert conditioning.text_BLD.shape == (2, 24, 1024)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        expected = sd2.denoiser(x, t, encoder_hidden_states=sd2.text_modules[0](sd2_ids(tmp_path / "sd2"))[0]).sample
        assert torch.equal(sd2.denoise(sd2.denoiser, x, t, conditioning), expected)


def sd2_ids(folder) -> torch.Tensor:
    """What the model's own tokenizer makes of the two prompts."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return tokenizer(["a cat", ""], padding="max_length", return_tensors="pt").input_ids


def test_images_are_encoded_some_at_a_time(folder, monkeypatch):
    family = load_family(str(folder), ("vae",))
    pixels = torch.rand(5, 3, 32, 64) * 2 - 1
    calls, encode = [], family.vae.encode
    monkeypatch.setattr(family.vae, "encode", lambda part: calls.append(len(part)) or encode(part))
    whole = family.posterior(pixels)
    monkeypatch.setattr("smpo_models.autoencoders.base.ENCODED_PIXELS", 2 * 32 * 64 + 7)
    parts = family.posterior(pixels)
    monkeypatch.setattr("smpo_models.autoencoders.base.ENCODED_PIXELS", 1)
    alone = family.posterior(pixels)
    assert calls == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    # The same but for the rounding of float32, which other batches sum in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make_tiny_model, make_tiny_xl])
def test_a_family_moves_with_all_its_parts(tmp_path, make):
    family = load_family(str(make(tmp_path)))
    family.to("meta")  # torch's device without memory
    for module in (family.denoiser, family.vae, *family.text_modules):
        assert {each.device.type for each in (*module.parameters(), *module.buffers())} == {"meta"}
    conditioning = family.condition(["a cat"], [(32, 32)], [(0, 0)])
    x = family.denoise(
        family.denoiser, torch.zeros(1, 4, 8, 8, device="meta"), torch.tensor([3], device="meta"), conditioning
    )
    assert x.device.type == family.posterior(torch.zeros(1, 3, 32, 32))[0].device.type == "meta"


def test_every_family_is_found():
    assert families().keys() == {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "QwenImagePipeline",
        "PixArtSigmaPipeline",
        "ZImagePipeline",
        "SanaPipeline",
        "Lumina2Pipeline",
        "Flux2KleinPipeline",
    }


@pytest.mark.parametrize("make", [make_tiny_model, make_tiny_xl])
def test_a_folder_with_a_missing_part_is_one_line(tmp_path, make):
    whole = make(tmp_path / "whole")
    parts = [path.name for path in whole.iterdir() if path.is_dir()]
    assert len(parts) in {5, 7}
    for part in parts:
        folder = shutil.copytree(whole, tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=f"--model {folder} cannot be loaded"):
            load_family(str(folder))


def test_a_vae_that_does_not_fit_is_one_line(folder, tmp_path):
    make_tiny_vae(scaling_factor=0.13025).save_pretrained(tmp_path / "scaled")
    make_tiny_vae(latent_channels=8).save_pretrained(tmp_path / "wide")
    make_tiny_vae().save_pretrained(tmp_path / "good")
    with pytest.raises(UserError, match="scaled has scaling_factor 0.13025, the VAE of --model .* 0.18215"):
        load_family(str(folder), vae=str(tmp_path / "scaled"))
    with pytest.raises(UserError, match="wide: the VAE has 8 latent channels, the denoiser of .* takes 4"):
        load_family(str(folder), vae=str(tmp_path / "wide"))
    make_tiny_vae(blocks=2).save_pretrained(tmp_path / "fine")
    with pytest.raises(UserError, match="fine makes one latent of 2 pixels a side, the VAE of --model .* of 4; name"):
        load_family(str(folder), ("text", "vae"), vae=str(tmp_path / "fine"))
    with pytest.raises(UserError, match="--vae .*nothing"):
        load_family(str(folder), vae=str(tmp_path / "nothing"))
    assert load_family(str(folder), ("vae",), vae=str(tmp_path / "good")).vae is not None


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_a_vae_that_scales_by_channel_is_one_line(tmp_path, name):
    """The SDXL pipeline decodes with these two; nothing here would."""
    folder = make_tiny_xl(tmp_path / "xl")
    make_tiny_vae(scaling_factor=0.13025, **{name: [0.5] * 4}).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=f"--vae .*vae: its VAE's config sets {name}"):
        load_family(str(folder), vae=str(tmp_path / "vae"))
    shutil.copytree(tmp_path / "vae", folder / "vae", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"--model .*xl: its VAE's config sets {name}"):
        load_family(str(folder), ("text",))
    make_tiny_vae(scaling_factor=0.13025).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"--vae .*other has {name} None, the VAE of --model .* \\[0.5, 0.5"):
        load_family(str(folder), vae=str(tmp_path / "other"))


@pytest.mark.parametrize("kind", [EDMDPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("converted", [False, True])
def test_a_scheduler_without_betas_is_one_line(folder, tmp_path, kind, converted):
    """Converted ones keep the keys of the scheduler that they were made from."""
    model = shutil.copytree(folder, tmp_path / "model")
    own = DDIMScheduler.load_config(folder / "scheduler")
    (kind.from_config(own) if converted else kind()).save_pretrained(model / "scheduler")
    assert ("beta_start" in DDIMScheduler.load_config(model / "scheduler")) == converted
    with pytest.raises(UserError, match=f"--model .*model: its scheduler, {kind.__name__}, has no beta schedule"):
        load_family(str(model), ())


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler])
def test_schedulers_of_the_same_process_are_one(folder, tmp_path, kind):
    model = shutil.copytree(folder, tmp_path / "model")
    kind.from_config(DDIMScheduler.load_config(folder / "scheduler")).save_pretrained(model / "scheduler")
    assert (
        load_family(str(model), ()).noise_schedule.fingerprint()
        == load_family(str(folder), ()).noise_schedule.fingerprint()
    )


def test_an_older_vae_config_without_scaling_factor_fits(folder, tmp_path):
    make_tiny_vae().save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.18215,', ""))
    assert load_family(str(folder), ("vae",), vae=str(tmp_path / "vae")).vae.config["scaling_factor"] == 0.18215


def test_a_denoiser_of_another_family_is_one_line(folder, tmp_path):
    other = make_tiny_xl(tmp_path / "xl")
    with pytest.raises(UserError, match="denoiser .* has cross_attention_dim 64"):
        load_family(str(folder), denoiser=other)


def save_lora(unet, path, **more) -> None:
    """As smpo-train does; with ``more`` settings, which then go into the file's header."""
    kinds = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False, "target_modules": kinds, **more})
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1.5)  # until it is trained, it changes nothing
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
        path,
        {name: layer.detach() for name, layer in layers.items()},
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() if more else None,
    )


def test_a_inverting_denoiser_is_a_folder_or_a_lora_on_top(folder, tmp_path):
    family = load_family(str(folder))
    tuned = load_family(str(folder), ("denoiser",)).denoiser
    save_lora(tuned, tmp_path / "run")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    conditioning = family.condition(["a cat", ""], [(1, 1)] * 2, [(0, 0)] * 2)
    with torch.no_grad():
        expected = family.denoise(tuned, x, t, conditioning)
        assert not torch.allclose(family.denoise(family.denoiser, x, t, conditioning), expected, atol=1e-3)
        for path in (tmp_path / "run", tmp_path / "run" / "pytorch_lora_weights.safetensors"):
            inverting_denoiser = load_tuned_denoiser(family, str(folder), path, f"--inverting-unet {path}")
            torch.testing.assert_close(
                family.denoise(inverting_denoiser, x, t, conditioning), expected, rtol=1e-4, atol=1e-5
            )
            assert not any(parameter.requires_grad for parameter in inverting_denoiser.parameters())
            assert fingerprint_module(inverting_denoiser) != fingerprint_module(family.denoiser)
        assert fingerprint_module(inverting_denoiser) != fingerprint_module(load_family(str(folder)).denoiser)
        other = make_tiny_model(tmp_path / "other", seed=8)
        inverting_denoiser = load_tuned_denoiser(family, str(folder), other, f"--inverting-unet {other}")
        assert fingerprint_module(inverting_denoiser) == fingerprint_module(load_family(str(other)).denoiser)


def test_a_lora_is_added_in_float32_to_weights_in_half_precision(folder, tmp_path):
    save_lora(load_family(str(folder), ("denoiser",)).denoiser, tmp_path)
    families = [load_family(str(folder), ("denoiser",)) for _ in range(2)]
    torch.nn.Module.to(families[0].denoiser, torch.bfloat16)
    families[1].denoiser.load_state_dict(families[0].denoiser.state_dict())
    tuned = [load_tuned_denoiser(family, str(folder), tmp_path, "--inverting-unet L") for family in families]
    assert {parameter.dtype for parameter in tuned[0].parameters()} == {torch.float32}
    assert fingerprint_module(tuned[0]) == fingerprint_module(tuned[1]) != fingerprint_module(families[0].denoiser)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_is_added_by_the_settings_in_its_header(folder, tmp_path, dora):
    """W + alpha / rank B A; DoRA (arXiv 2402.09353) scales its rows to lengths of their own."""
    tuned = load_family(str(folder), ("denoiser",)).denoiser
    save_lora(tuned, tmp_path, lora_alpha=8, use_dora=dora)
    layers = get_peft_model_state_dict(tuned)
    family = load_family(str(folder), ("denoiser",))
    inverting_denoiser = load_tuned_denoiser(family, str(folder), tmp_path, f"--inverting-unet {tmp_path}").state_dict()
    changed = 0
    for name, weight in family.denoiser.state_dict().items():
        layer, expected = name.removesuffix(".weight"), weight
        if f"{layer}.lora_A.weight" in layers:
            expected = weight + 8 / 4 * layers[f"{layer}.lora_B.weight"] @ layers[f"{layer}.lora_A.weight"]
            if dora:
                expected = expected * (layers[f"{layer}.lora_magnitude_vector"] / expected.norm(dim=1))[:, None]
            assert not torch.allclose(expected, weight, atol=1e-2)
            changed += 1
        torch.testing.assert_close(inverting_denoiser[name], expected, rtol=1e-5, atol=1e-6)
    assert changed == len(layers) // (3 if dora else 2) > 0


def test_a_inverting_denoiser_that_does_not_fit_is_one_line(folder, tmp_path):
    family = load_family(str(folder), ("denoiser",))
    other = make_tiny_xl(tmp_path / "xl")
    save_lora(load_family(str(other), ("denoiser",)).denoiser, tmp_path / "run")
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="--inverting-unet .*run"):
        load_tuned_denoiser(family, str(folder), tmp_path / "run", f"--inverting-unet {tmp_path / 'run'}")
    safetensors.torch.save_file({"text_encoder.a.lora.down.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match="--inverting-unet .*run"):
        load_tuned_denoiser(family, str(folder), tmp_path / "run", f"--inverting-unet {tmp_path / 'run'}")
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="--inverting-unet .*run.* cannot be loaded"):
        load_tuned_denoiser(family, str(folder), tmp_path / "run", f"--inverting-unet {tmp_path / 'run'}")
    with pytest.raises(UserError, match="holds no denoiser"):
        load_tuned_denoiser(family, str(folder), tmp_path, f"--inverting-unet {tmp_path}")
