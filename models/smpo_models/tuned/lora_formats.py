"""LoRA files for other programs than diffusers, made from diffusers' own file.

``kohya`` has the names of kohya's trainers, which most programs read, and the alpha of each layer. ``comfyui`` has what
ComfyUI reads; under PEFT's names it expects no alpha, so that alpha / rank is multiplied into the weights. diffusers'
``load_lora_weights`` reads all of these files, too; the tests load them with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.tuned.lora import Lora, read_lora
from smpo_schemas.trained_model import LORA_FILE, LoraFormat, lora_file

_Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""The matrices A [rank, inputs] and B [outputs, rank] of each layer, by the layer's name in the denoiser."""

_Tensors = dict[str, torch.Tensor]

_TO_Q_K_V = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADD_Q_K_V = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_MATRICES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora.down.weight": "A", ".lora.up.weight": "B"}
"""Which matrix a tensor is, by the end of its name in diffusers' files: two for transformers, two for UNets."""

_FLUX = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
"""Published names, by diffusers' names, of the layers of FLUX's blocks that correspond one to one."""

_MLP_RATIO = 4
"""Number of outputs of ``proj_mlp`` per output of ``attn.to_q``, in FLUX.1."""


def _kohya(layers: _Layers, alpha: float) -> _Tensors:
    """Name layers as kohya's trainers do: the denoiser's own names, with underscores."""
    tensors: _Tensors = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def _kohya_flux(layers: _Layers, alpha: float) -> _Tensors:
    """Name the layers of FLUX.1 and FLUX.2 as published, with one layer in place of several of diffusers'."""
    blocks: dict[str, _Layers] = {}
    for name, matrices in layers.items():
        kind, number, layer = name.split(".", 2)
        block = f"{'double' if kind == 'transformer_blocks' else 'single'}_blocks.{number}"
        blocks.setdefault(block, {})[layer] = matrices
    tensors: _Tensors = {}
    for block, own in blocks.items():
        left = dict(own)
        if block.startswith("double"):
            tensors |= _fused(f"{block}.img_attn.qkv", left, _TO_Q_K_V, alpha)
            tensors |= _fused(f"{block}.txt_attn.qkv", left, _ADD_Q_K_V, alpha)
        elif _TO_Q_K_V[0] in left:  # FLUX.1; in FLUX.2 this is one layer in diffusers, too
            rows = _MLP_RATIO * left[_TO_Q_K_V[0]][1].shape[0]
            tensors |= _fused(f"{block}.linear1", left, _TO_Q_K_V, alpha, rows_below=rows)
        tensors |= _kohya({f"{block}.{_FLUX[layer]}": matrices for layer, matrices in left.items()}, alpha)
    return tensors


def _fused(name: str, layers: _Layers, parts: tuple[str, ...], alpha: float, rows_below: int = 0) -> _Tensors:
    """Take ``parts`` out of ``layers`` and join them to one adapter, for the layer that has all their outputs in order.

    Its rank is the sum of theirs, and alpha grows in proportion, since the strength is alpha / rank. ``rows_below``
    further outputs of that layer are not changed.
    """
    downs, ups = zip(*(layers.pop(part) for part in parts), strict=True)
    up = torch.block_diag(*ups)
    up = torch.cat([up, up.new_zeros(rows_below, up.shape[1])])
    return _kohya({name: (torch.cat(downs), up)}, alpha * len(parts))


def _peft(prefix: str) -> Callable[[_Layers, float], _Tensors]:
    """Name layers as PEFT does, with alpha / rank in B."""

    def name(layers: _Layers, alpha: float) -> _Tensors:
        tensors: _Tensors = {}
        for layer, (down, up) in layers.items():
            key = f"{prefix}.{layer}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * (alpha / down.shape[0])}
        return tensors

    return name


_NAMINGS: Mapping[str, Mapping[str, Callable[[_Layers, float], _Tensors]]] = {
    # ComfyUI knows diffusers' names of UNet layers only as they were before PEFT, but it knows kohya's.
    "UNet2DConditionModel": {"kohya": _kohya, "comfyui": _kohya},
    # diffusers reads no kohya file of SD3.
    "SD3Transformer2DModel": {"comfyui": _peft("transformer")},
    "FluxTransformer2DModel": {"kohya": _kohya_flux, "comfyui": _peft("transformer")},
    # ComfyUI knows FLUX.2's single blocks by their published names.
    "Flux2Transformer2DModel": {"kohya": _kohya_flux, "comfyui": _kohya_flux},
    "QwenImageTransformer2DModel": {"kohya": _kohya, "comfyui": _peft("diffusion_model")},
    "ZImageTransformer2DModel": {"kohya": _kohya, "comfyui": _peft("diffusion_model")},
}
"""The function that makes each format, by the denoiser's class."""


def require_lora_format(lora_format: LoraFormat, kind: type, model: str) -> None:
    """Check that a format exists for a denoiser.

    Args:
        lora_format: the format.
        kind: class of the denoiser.
        model: names the model in the error.

    Raises:
        UserError: it does not; names those that do.
    """
    known = ["diffusers", *_NAMINGS.get(kind.__name__, ())]
    if lora_format not in known:
        raise UserError(
            f"--lora-format {lora_format}: there is none for the {kind.__name__} of {model} that diffusers would read; "
            f"use {' or '.join(known)}"
        )


def write_lora_format(folder: Path, lora_format: LoraFormat, kind: type) -> Path:
    """Write a LoRA in another format, beside the file that diffusers wrote.

    Args:
        folder: holds diffusers' file.
        lora_format: the format; for ``diffusers`` nothing is written.
        kind: class of the denoiser.

    Returns:
        The file in this format.

    Raises:
        UserError: diffusers' file cannot be read, or the new one cannot be written.
    """
    target = folder / lora_file(lora_format)
    if lora_format != "diffusers":
        lora = read_lora(folder / LORA_FILE, kind, {}, f"LoRA {folder}")
        layers = _matrices(lora)
        (rank,) = {down.shape[0] for down, _ in layers.values()}
        alpha = float((lora.settings or {}).get(f"{lora.prefix}.lora_alpha", rank))
        tensors = _NAMINGS[kind.__name__][lora_format](layers, alpha)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_bytes(target, safetensors.torch.save(contiguous, {"format": "pt"}))  # by save_file others cannot read it
    return target


def _matrices(lora: Lora) -> _Layers:
    """Pair the matrices of each layer."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in lora.layers.items():
        end = next(end for end in _MATRICES if key.endswith(end))
        layer = key.removeprefix(f"{lora.prefix}.").removesuffix(end)
        found.setdefault(layer, {})[_MATRICES[end]] = tensor
    return {layer: (both["A"], both["B"]) for layer, both in found.items()}
