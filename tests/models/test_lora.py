"""LoRA files in the formats that people have, against plain matrix products."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from smpo_common.errors import UserError
from smpo_models.tuned.lora import check_lora, fuse_lora
from tests.tiny.families import FLOW_FAMILIES
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_unet

_RANK = 2
_ALPHA = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def without_weights(denoiser):
    with torch.device("meta"):
        return type(denoiser).from_config(denoiser.config)


def attention_layers(unet) -> dict[str, torch.Tensor]:
    """A random LoRA by module, as [down, up]."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(_RANK, module.in_features, generator=generator),
            torch.randn(module.out_features, _RANK, generator=generator),
        )
        for name, module in unet.named_modules()
        if name.endswith(("attn1.to_q", "attn2.to_v", "attn1.to_out.0"))
    }


def kohya_file(path, layers) -> None:
    """By kohya's own naming: lora_unet_, the module's name with underscores, lora_down, lora_up, alpha."""
    tensors = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(_ALPHA)}
    save_file(tensors, path)


def test_a_kohya_file_is_added_by_its_own_alpha(unet, tmp_path):
    """W + alpha / rank up down."""
    layers = attention_layers(unet)
    kohya_file(tmp_path / "kohya.safetensors", layers)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    check_lora(tmp_path / "kohya.safetensors", without_weights(unet), "--inverting-unet x", "--model y")
    fuse_lora(unet, tmp_path / "kohya.safetensors", "--inverting-unet x", "--model y")
    for name, weight in unet.state_dict().items():
        expected = before[name]
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            down, up = layers[name.removesuffix(".weight")]
            expected = expected + _ALPHA / _RANK * up @ down
            assert not torch.allclose(expected, before[name], atol=1e-2)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_the_check_loads_no_weights_and_finds_what_fusing_finds(unet, tmp_path):
    layers = attention_layers(unet)
    path = tmp_path / "lora.safetensors"
    for name, (down, up), words in (
        ("down_blocks.9.attn1.to_q", (torch.zeros(_RANK, 8), torch.zeros(8, _RANK)), "layers only"),
        (next(iter(layers)), (torch.zeros(_RANK, 999), torch.zeros(999, _RANK)), "cannot be loaded: .*size mismatch"),
    ):
        kohya_file(path, {**layers, name: (down, up)})
        with pytest.raises(UserError, match=f"--inverting-unet x.*{words}"):
            check_lora(path, without_weights(unet), "--inverting-unet x", "M")
        with pytest.raises(UserError, match=f"--inverting-unet x.*{words}"):
            fuse_lora(make_tiny_unet(), path, "--inverting-unet x", "M")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "1 of its .* layers change the text encoder"),
        ("text_encoder.a.lora.down.weight", "1 of its .* layers change the text encoder"),
        ("lora_unet_mid_block_x.hada_w1_a", "hada_w1_a"),
        ("lora_unet_mid_block_x.dora_scale", "dora_scale"),
        ("diffusion_model.middle_block.1.lora_A.weight", "first diffusion_model.middle_block.1.lora_A.weight"),
    ],
)
def test_what_is_no_lora_of_the_denoiser_is_named(unet, tmp_path, key, words):
    """diffusers leaves some of these out without an error, and lists the others over many lines."""
    path = tmp_path / "lora.safetensors"
    own = {"unet.a.lora.down.weight": torch.zeros(2, 2)} if key.startswith(("text", "diffusion")) else {}
    save_file({**own, key: torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match=f"--inverting-unet x.*{words}"):
        check_lora(path, without_weights(unet), "--inverting-unet x", "--model y")


def test_diffusers_own_conversion_to_kohya_comes_back(folder, unet, tmp_path):
    """The whole way round through the library: its kohya file, its pipeline's loader, and ours give one UNet."""
    layers = attention_layers(unet)
    peft = {}
    for name, (down, up) in layers.items():
        peft |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    path = tmp_path / "kohya.safetensors"
    save_file({name: value.contiguous() for name, value in convert_state_dict_to_kohya(peft).items()}, path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fuse_lora(unet, path, "--inverting-unet x", "--model y")
    for name, weight in unet.state_dict().items():
        torch.testing.assert_close(weight, pipeline.unet.state_dict()[name])


def test_a_lora_for_another_architecture_does_not_fit(unet, tmp_path):
    kohya_file(tmp_path / "lora.safetensors", attention_layers(unet))
    with pytest.raises(UserError, match="--inverting-unet x"):
        check_lora(
            tmp_path / "lora.safetensors", make_tiny_unet(cross_attention_dim=64).to("meta"), "--inverting-unet x", "M"
        )


@pytest.mark.slow
@pytest.mark.parametrize("make", FLOW_FAMILIES.values(), ids=FLOW_FAMILIES)
def test_a_transformers_lora_is_added_as_its_pipeline_does(tmp_path, make):
    """W + up down; in diffusers' format alone, whose names begin with ``transformer``."""
    pipeline = DiffusionPipeline.from_pretrained(make(tmp_path / "model"))
    transformer = pipeline.transformer
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: (
            torch.randn(_RANK, module.in_features, generator=generator),
            torch.randn(module.out_features, _RANK, generator=generator),
        )
        for name, module in transformer.named_modules()
        if name.endswith((".to_q", ".add_k_proj", ".to_out.0"))
    }
    saved = {}
    for name, (down, up) in layers.items():
        saved |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=saved)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    fuse_lora(transformer, file, "--inverting-unet x", "--model y")
    for name, weight in transformer.state_dict().items():
        down, up = layers.get(name.removesuffix(".weight"), (None, None))
        expected = before[name] if down is None or not name.endswith(".weight") else before[name] + up @ down
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "model")
    stock.load_lora_weights(str(tmp_path))
    stock.fuse_lora()
    stock.unload_lora_weights()
    for name, weight in stock.transformer.state_dict().items():
        torch.testing.assert_close(weight, transformer.state_dict()[name], rtol=1e-5, atol=1e-6)
    kohya_file(file, layers)
    with pytest.raises(UserError, match=r"--inverting-unet x: its layers are named otherwise than .*transformer\.\*"):
        fuse_lora(transformer, file, "--inverting-unet x", "--model y")
