"""Frozen weights that are kept in the type that autocast casts them to."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smpo_common.errors import UserError
from smpo_models.arithmetic import narrow_products
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.tuned.lora import add_lora
from tests.tiny.families import FLOW_FAMILIES
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl

F32, BF16 = torch.float32, torch.bfloat16

MODELS = {
    "sd15": make_tiny_model,
    "sdxl": make_tiny_xl,
    "sd3": lambda path: make_tiny_sd3(path, version="3"),
    "flux1-schnell": lambda path: make_tiny_flux(path, guided=False),
    **FLOW_FAMILIES,
}


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory) -> Family:
    return load_family(str(MODELS[request.param](tmp_path_factory.mktemp("model"))), ("denoiser", "text"))


def forward(family: Family, denoiser: torch.nn.Module) -> torch.Tensor:
    """The output under autocast."""
    x_BChw = torch.randn(3, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    # Neighbours in bfloat16, for models that round their times.
    t_B = torch.tensor([500.25, 501.5, 502.75]).to(family.noise_schedule.timestep_dtype)
    conditioning = family.condition(["a cat", "a dog", ""], [(32, 32)] * 3, [(0, 0)] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        return family.denoise(denoiser, x_BChw, t_B, conditioning)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_narrow_products_change_no_bit_of_forward_and_backward(family: Family, adapted: bool) -> None:
    outputs, gradients = [], []
    whole = copy.deepcopy(family.denoiser)
    if adapted:
        torch.manual_seed(0)
        add_lora(whole, family.lora_targets, 2, idle=family.idle_layers)
        for name, parameter in whole.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data)
    narrow = copy.deepcopy(whole)
    narrow_products(narrow, torch.bfloat16)
    halves = {parameter.dtype for parameter in narrow.parameters() if not parameter.requires_grad}
    # SD3 has no weights but those of products.
    assert halves == {torch.bfloat16} if family.kind == "sd3" else {torch.float32, torch.bfloat16}
    assert sum(p.nbytes for p in narrow.parameters()) < 0.6 * sum(p.nbytes for p in whole.parameters())
    for denoiser in (whole, narrow):
        output = forward(family, denoiser)
        outputs.append(output.detach())
        if adapted:
            output.square().sum().backward()
            trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
            assert {p.dtype for p in trained.values()} == {torch.float32}
            gradients.append({name: p.grad for name, p in trained.items()})
    assert torch.equal(*outputs)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 0
    if adapted:
        assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
        assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.slow
def test_files_in_half_precision_are_loaded_as_they_are_without_changing_a_bit(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family._model, tmp_path / "model")
    torch.nn.Module.to(copy.deepcopy(family.denoiser), torch.bfloat16).save_pretrained(folder / family.denoiser_folder)
    whole, narrow = (load_family(str(folder), ("denoiser",), denoiser_dtype=dtype).denoiser for dtype in (F32, BF16))
    assert ({each.dtype for each in whole.parameters()}, {each.dtype for each in narrow.parameters()}) == (
        {F32},
        {BF16},
    )
    assert fingerprint_module(whole) == fingerprint_module(narrow)
    for denoiser in (whole, narrow):
        torch.manual_seed(0)
        add_lora(denoiser, family.lora_targets, 2, idle=family.idle_layers)
        narrow_products(denoiser, BF16)
    for of in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        expected, found = dict(of(whole)), dict(of(narrow))
        assert {name: each.dtype for name, each in found.items()} == {name: e.dtype for name, e in expected.items()}
        assert all(torch.equal(each, expected[name]) for name, each in found.items())
    assert torch.equal(forward(family, whole), forward(family, narrow))


def test_only_files_that_hold_no_more_are_loaded_in_half_precision(tmp_path: Path) -> None:
    folder = make_tiny_sd3(tmp_path, version="3", t5=False)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    first, *others = weights
    kinds = {
        "whole": weights,
        "one whole": {first: weights[first]} | {name: weights[name].bfloat16() for name in others},
        "other half": {name: each.half() for name, each in weights.items()},
    }
    for kind, tensors in kinds.items():
        save_file(tensors, file)
        denoiser = load_family(str(folder), ("denoiser",), denoiser_dtype=BF16).denoiser
        assert {each.dtype for each in denoiser.parameters()} == {F32}, kind
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_family(str(folder), ("denoiser",), denoiser_dtype=BF16)
