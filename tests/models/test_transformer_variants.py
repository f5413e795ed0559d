"""Variants of PixArt-Sigma, Z-Image and Sana: what is loaded as it was published, and what is refused in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file

from smpo_common.errors import UserError
from smpo_models.family_bases.masked_text import rows
from smpo_models.loading import load_family, load_tuned_denoiser
from smpo_models.sampling import load_pipeline
from smpo_models.tuned.lora import check_lora
from tests.tiny.transformers import make_tiny_pixart, make_tiny_sana, make_tiny_z_image


def change(folder: Path, name: str, **settings: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_pixart_is_loaded_under_the_name_that_its_transformer_was_published_with(tmp_path):
    """Diffusers' Transformer2DModel, of which PixArtTransformer2DModel takes some settings and leaves others."""
    folder = make_tiny_pixart(tmp_path)
    own = load_family(str(folder), ("denoiser",)).denoiser
    older = {"num_vector_embeds": None, "use_linear_projection": False, "only_cross_attention": False}
    change(folder, "transformer/config.json", _class_name="Transformer2DModel", **older)
    change(folder, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    family = load_family(str(folder), ("denoiser",))
    assert isinstance(family.denoiser, PixArtTransformer2DModel)
    pipeline = load_pipeline(str(folder), "--model m", {}, dtype=torch.float32, variant=None)
    for found in (family.denoiser, pipeline.transformer):
        for name, weight in own.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight)


def test_pixart_without_a_variance_is_known(tmp_path):
    family = load_family(str(make_tiny_pixart(tmp_path, out_channels=4)), ("denoiser", "text"))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        assert family.denoise(family.denoiser, x, t, family.condition(["a cat"], [(32, 32)], [(0, 0)])).shape == x.shape


def test_pixart_takes_no_lora(tmp_path):
    folder, lora = make_tiny_pixart(tmp_path / "model"), tmp_path / "lora.safetensors"
    weights = {"transformer.proj_out.lora_A.weight": torch.zeros(2, 32)}
    save_file(weights | {"transformer.proj_out.lora_B.weight": torch.zeros(32, 2)}, lora)
    family = load_family(str(folder), ("denoiser",))
    words = f"--inverting-unet {lora}: diffusers has no LoRA for the denoiser of --model .* .PixArtTransformer2DModel"
    with pytest.raises(UserError, match=words):
        load_tuned_denoiser(family, str(folder), lora, f"--inverting-unet {lora}")
    with pytest.raises(UserError, match="--model x: diffusers has no LoRA"):
        check_lora(lora, family.empty_denoiser(), "--model x", "m")


def test_a_linspace_schedule_begins_at_its_first_timestep_and_steps_from_one_to_the_next(tmp_path):
    """As trailing timesteps do; diffusers' DDIM steps by T / n, whatever the next timestep."""
    family = load_family(str(make_tiny_pixart(tmp_path)), ())
    assert family.noise_schedule.grid(4, 16) == [249, 499, 749, 999]


def test_sana_by_a_scheduler_of_flow_matching_is_told_times_with_their_fraction(tmp_path):
    """As those who train it with diffusers save it; there the pipeline hands over no times of its own."""
    folder, other = make_tiny_sana(tmp_path / "solver"), make_tiny_sana(tmp_path / "euler")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(other / "scheduler")
    change(other, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    solver, euler = load_family(str(folder), ()).noise_schedule, load_family(str(other), ()).noise_schedule
    assert (solver.cuts_times, euler.cuts_times) == (True, False)
    assert solver.fingerprint() != euler.fingerprint()
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(5)
    assert euler.grid(5, 64) == sorted(stock.timesteps.tolist())
    multistep = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    multistep.set_timesteps(5)
    assert solver.grid(5, 64) == pytest.approx([1000 * sigma for sigma in multistep.sigmas.tolist()[-2::-1]], rel=1e-6)
    pipeline = load_pipeline(str(folder), "--model m", {}, dtype=torch.float32, variant=None, sampler="ddim")
    assert pipeline.scheduler.config.solver_order == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm_type", "sde-dpmsolver++"),
        ("use_karras_sigmas", True),
        ("prediction_type", "epsilon"),
        ("use_dynamic_shifting", True),
    ],
)
def test_another_solver_of_sanas_is_one_line(tmp_path, name, value):
    folder = make_tiny_sana(tmp_path)
    change(folder, "scheduler/scheduler_config.json", **{name: value})
    with pytest.raises(
        UserError, match=rf"--model {folder}: its scheduler's config sets {name} to {re.escape(str(value))}; .* only"
    ):
        load_family(str(folder), ())


def test_a_solver_that_is_not_of_flow_models_is_one_line(tmp_path):
    folder = make_tiny_sana(tmp_path, use_flow_sigmas=False)
    with pytest.raises(UserError, match=f"--model {folder}: its scheduler is DPMSolverMultistepScheduler"):
        load_family(str(folder), ())


def test_transformers_of_other_models_are_one_line(tmp_path):
    alpha = make_tiny_pixart(tmp_path / "alpha", use_additional_conditions=True)
    with pytest.raises(UserError, match=r"takes the image's size \(use_additional_conditions\), as PixArt-Alpha's"):
        load_family(str(alpha), ())
    sprint = make_tiny_sana(tmp_path / "sprint")
    change(sprint, "transformer/config.json", guidance_embeds=True)
    with pytest.raises(UserError, match=r"is told a guidance scale \(guidance_embeds\), as Sana Sprint's"):
        load_family(str(sprint), ())
    coarse = make_tiny_z_image(tmp_path / "coarse")
    change(coarse, "transformer/config.json", all_patch_size=[4])
    with pytest.raises(UserError, match=r"has all_patch_size \[4\], without 2"):
        load_family(str(coarse), ())


def test_sanas_empty_prompt_is_the_negative_one_or_one_with_the_instruction(tmp_path):
    family = load_family(str(make_tiny_sana(tmp_path)), ("text",))
    negative, written = family.encode_text([""]), family.text_settings()
    family.encodes_empty_prompt = True
    empty = family.encode_text([""])
    # <bos>; and <bos> with the last token of the instruction.
    assert (negative["text"].shape[1], empty["text"].shape[1]) == (1, 2)
    assert torch.allclose(negative["text"][:, 0], empty["text"][:, 0], atol=1e-6)
    assert written["instruction"]


def test_rows_end_where_their_mask_does_and_are_whole_on_the_meta_device():
    text, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[True, True, False], [True, True, True]])
    first, second = rows(text, mask)
    assert torch.equal(first, text[0, :2])
    assert torch.equal(second, text[1])
    assert [row.shape for row in rows(text.to("meta"), mask.to("meta"))] == [(3, 2), (3, 2)]


def test_a_tokenizer_that_is_only_a_sentencepiece_file_names_the_packages(tmp_path):
    """As PixArt-Sigma's; they are not among the requirements."""
    folder = make_tiny_pixart(tmp_path)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(UserError, match="its tokenizer has no tokenizer.json.*pip install sentencepiece protobuf"):
        load_family(str(folder), ("text",))
