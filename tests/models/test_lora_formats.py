"""LoRA files for other programs, as the stock loaders of diffusers read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import nn

from smpo_common.errors import UserError
from smpo_models.tuned.lora_formats import require_lora_format, write_lora_format
from smpo_schemas.trained_model import LORA_FILE, lora_file

_RANK, _ALPHA = 3, 1.5

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_lora(shapes: dict[str, tuple[int, int]]) -> Matrices:
    """A [rank, inputs] and B [outputs, rank] of layers with these inputs and outputs."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(_RANK, inputs, generator=generator), torch.randn(outputs, _RANK, generator=generator))
        for name, (inputs, outputs) in shapes.items()
    }


def write_diffusers_file(folder: Path, prefix: str, layers: Matrices) -> None:
    """As ``save_lora_weights`` of the pipelines writes it, with alpha in the header."""
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    settings = {f"{prefix}.r": _RANK, f"{prefix}.lora_alpha": _ALPHA, f"{prefix}.target_modules": sorted(layers)}
    save_file(tensors, folder / LORA_FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})


def products(tensors: dict[str, torch.Tensor], x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A x of each layer in a file that has no alpha, by the layer's name."""
    ends = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        name: tensors[f"{name}.lora_B.weight"].double() @ (tensors[f"{name}.lora_A.weight"].double() @ x[name])
        for name in ends
    }


def flux_shapes() -> dict[str, tuple[int, int]]:
    """The attention of one double and one single block of FLUX.1, whose width diffusers' reader takes for granted."""
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [f"transformer_blocks.18.attn.{name}" for name in double]
    names += [f"single_transformer_blocks.37.attn.{name}" for name in double[:3]]
    return dict.fromkeys(names, (3072, 3072))


def flux2_shapes() -> dict[str, tuple[int, int]]:
    """The attention of FLUX.2: in a single block it is one layer with the MLP."""
    double = [name for name in flux_shapes() if not name.startswith("single")]
    single = {
        "single_transformer_blocks.19.attn.to_qkv_mlp_proj": (8, 70),
        "single_transformer_blocks.19.attn.to_out": (20, 8),
    }
    return {**dict.fromkeys(double, (8, 8)), **single}


def names_in(blocks: list[str], layers: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {f"{block}.{layer}": (8, 6) for block in blocks for layer in layers}


QWEN = names_in(
    ["transformer_blocks.0.attn", "transformer_blocks.11.attn"],
    ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
Z_IMAGE = names_in(
    ["layers.0.attention", "noise_refiner.1.attention", "context_refiner.0.attention"],
    ("to_q", "to_k", "to_v", "to_out.0"),
)


@pytest.mark.parametrize(
    ("pipeline", "kind", "shapes"),
    [
        (FluxPipeline, FluxTransformer2DModel, flux_shapes()),
        (Flux2KleinPipeline, Flux2Transformer2DModel, flux2_shapes()),
        (QwenImagePipeline, QwenImageTransformer2DModel, QWEN),
        (ZImagePipeline, ZImageTransformer2DModel, Z_IMAGE),
    ],
)
@pytest.mark.parametrize("lora_format", ["kohya", "comfyui"])
def test_the_pipeline_reads_the_same_products(tmp_path, pipeline, kind, shapes, lora_format):
    """alpha / rank B A x of every layer, in the names and matrices that the stock loader makes of the file."""
    layers = random_lora(shapes)
    write_diffusers_file(tmp_path, "transformer", layers)
    written = write_lora_format(tmp_path, lora_format, kind)
    assert written == tmp_path / lora_file(lora_format)
    (tmp_path / "any").touch()
    assert written.stat().st_mode == (tmp_path / "any").stat().st_mode  # safetensors' own function writes 0600
    read = pipeline.lora_state_dict(tmp_path, weight_name=lora_file(lora_format))
    generator = torch.Generator().manual_seed(1)
    x = {
        f"transformer.{name}": torch.randn(inputs, generator=generator).double() for name, (inputs, _) in shapes.items()
    }
    # Of the fused layer it reads one more, of the MLP, that the adapter does not change.
    unchanged = {name: tensor for name, tensor in read.items() if "proj_mlp" in name}
    assert all(not tensor.any() for name, tensor in unchanged.items() if "lora_B" in name)
    found = products({name: tensor for name, tensor in read.items() if name not in unchanged}, x)
    assert set(found) == set(x)
    for name, (down, up) in layers.items():
        expected = _ALPHA / _RANK * up.double() @ (down.double() @ x[f"transformer.{name}"])
        torch.testing.assert_close(found[f"transformer.{name}"], expected, rtol=1e-4, atol=1e-4)


def test_a_unets_kohya_file_has_diffusers_own_names_and_our_alpha(tmp_path):
    """diffusers' converter takes alpha to be the rank."""
    layers = random_lora(names_in(["down_blocks.0.attentions.1.transformer_blocks.0.attn2"], ("to_q", "to_out.0")))
    write_diffusers_file(tmp_path, "unet", layers)
    tensors = load_file(write_lora_format(tmp_path, "kohya", UNet2DConditionModel))
    expected = convert_state_dict_to_kohya(load_file(tmp_path / LORA_FILE))
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], torch.tensor(_ALPHA) if name.endswith(".alpha") else tensor)


@pytest.mark.parametrize(
    ("lora_format", "kind", "words"),
    [
        ("kohya", SD3Transformer2DModel, "use diffusers or comfyui"),
        ("comfyui", nn.Linear, "use diffusers"),
    ],
)
def test_a_format_that_nothing_would_read_is_refused(lora_format, kind, words):
    require_lora_format("diffusers", kind, "--model M")
    with pytest.raises(UserError, match=f"--lora-format {lora_format}: .*{kind.__name__} of --model M .*; {words}$"):
        require_lora_format(lora_format, kind, "--model M")
