"""Model folders as people have them: configs that leave settings out, variants of weights, models for other jobs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from smpo_common.errors import UserError
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.weights import variant_remark
from tests.tiny.stable_diffusion import IMAGE_SIDE, make_tiny_model, make_tiny_unet

_PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def with_unet_config(folder, out, **changes):
    """A copy of the folder; a setting that is ``...`` is taken out."""
    shutil.copytree(folder, out)
    path = out / "unet" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return out


def half_files(folder, out, variant, *, keep=False, parts=_PARTS):
    """A copy whose parts have float16 weights under the variant's name, beside or in place of the others."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    for part in parts:
        (file,) = (path for path in (out / part).glob("*.safetensors") if path.name.count(".") == 1)
        tensors = {name: value.half() for name, value in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.{variant}.safetensors"), metadata={"format": "pt"})
        if not keep:
            file.unlink()
    return out


@pytest.mark.parametrize("size", [None, ..., [16, 8]])
def test_a_model_that_names_no_square_needs_a_resolution(folder, tmp_path, size):
    family = load_family(str(with_unet_config(folder, tmp_path / "model", sample_size=size)))
    assert family.latent_shape(IMAGE_SIDE, IMAGE_SIDE) == (4, 8, 8)
    with pytest.raises(UserError, match=r"unet/config.json.*--resolution"):
        family.resolution()


def test_a_square_may_be_a_list(folder, tmp_path):
    assert load_family(str(with_unet_config(folder, tmp_path / "model", sample_size=[8, 8])), ()).resolution() == 32


def test_channels_that_a_config_leaves_out_are_the_librarys_default(folder, tmp_path):
    family = load_family(str(with_unet_config(folder, tmp_path / "model", in_channels=..., out_channels=...)))
    assert family.latent_shape(IMAGE_SIDE, IMAGE_SIDE)[0] == 4
    assert fingerprint_module(family.denoiser) == fingerprint_module(load_family(str(folder)).denoiser)


def test_an_inpainting_model_is_refused_before_weights_are_loaded(folder, tmp_path):
    nine = shutil.copytree(folder, tmp_path / "nine")
    make_tiny_unet(in_channels=9).save_pretrained(nine / "unet")
    with pytest.raises(UserError, match="nine.*9 channels"):
        load_family(str(nine), ())
    five = shutil.copytree(folder, tmp_path / "five")
    make_tiny_unet(in_channels=5, out_channels=5).save_pretrained(five / "unet")
    with pytest.raises(UserError, match="five.*4 latent channels.*takes 5"):
        load_family(str(five), ())
    with pytest.raises(UserError, match="nine.*in_channels 9"):
        load_family(str(folder), ("denoiser",), denoiser=nine)


def test_the_only_variant_is_loaded_and_said(folder, tmp_path):
    half = half_files(folder, tmp_path / "half", "fp16")
    family, own = load_family(str(half)), load_family(str(folder))
    for part, other in (
        (family.denoiser, own.denoiser),
        (family.vae, own.vae),
        (family.text_modules[0], own.text_modules[0]),
    ):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        for loaded, given in zip(part.parameters(), other.parameters(), strict=True):
            assert torch.equal(loaded, given.half().float())
    remark = variant_remark(str(half), None)
    assert all(f"{part} (fp16)" in remark for part in _PARTS)


def test_a_variant_beside_others_is_loaded_where_it_is_named(folder, tmp_path):
    both = half_files(folder, tmp_path / "both", "fp16", keep=True, parts=("unet",))
    assert variant_remark(str(both), None) is None
    own = load_family(str(folder), ("denoiser",)).denoiser
    assert fingerprint_module(load_family(str(both), ("denoiser",)).denoiser) == fingerprint_module(own)
    assert "unet (fp16)" in variant_remark(str(both), "fp16")
    half = load_family(str(both), variant="fp16")  # the other parts have none, and give what they have
    assert fingerprint_module(half.denoiser) != fingerprint_module(own)
    with pytest.raises(UserError, match="--variant fp61"):
        variant_remark(str(both), "fp61")


def test_several_variants_alone_need_a_name(folder, tmp_path):
    two = half_files(folder, tmp_path / "two", "fp16", keep=True, parts=("unet",))
    half_files(folder, two, "non_ema", parts=("unet",))
    with pytest.raises(UserError, match="two.*--variant fp16 or non_ema"):
        load_family(str(two))
    assert load_family(str(two), variant="non_ema").denoiser is not None
