"""``--quantize``: the frozen weights below an adapter in 4 or 8 bits, by diffusers' quantizers and bitsandbytes.

nf4: blocks of 64 weights share an absmax (https://arxiv.org/abs/2305.14314); products are computed with the
dequantized weights, in the dtype of the run. int8: LLM.int8() (https://arxiv.org/abs/2208.07339), which rounds the
inputs of products to 8 bits, too.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from diffusers import BitsAndBytesConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn

from smpo_common.errors import UserError
from smpo_schemas.choices import Quantization
from smpo_trainer.settings import TrainSettings

CPU_REMARK = (
    "on a CPU --quantize is for trials: slow, and bitsandbytes 0.50.2 reads nf4 weights back wrongly there, for layers "
    "whose number of inputs is a multiple of 16 but not of 64"
)


def require_quantization(settings: TrainSettings) -> None:
    """Check that ``--quantize`` is possible, before any weights are loaded.

    Raises:
        UserError: all weights are to be trained, or bitsandbytes is not installed.
    """
    method = settings.denoiser.quantize
    if method is None:
        return
    if settings.denoiser.lora_rank is None:
        raise UserError(
            f"--quantize {method}: quantized weights cannot be trained; give --lora-rank too, for example --lora-rank "
            "16, to train an adapter"
        )
    if settings.compute.compile:
        raise UserError(f"--quantize {method} is not supported with --compile; leave one of them out")
    import_bitsandbytes(f"--quantize {method}")


def import_bitsandbytes(flag: str) -> ModuleType:
    """Import bitsandbytes, which is optional.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"{flag} needs bitsandbytes, which is not installed: pip install 'smpo-diffusion[quantize]'"
        ) from error


def quantize(denoiser: Any, method: Quantization, dtype: torch.dtype, device: torch.device) -> int:  # noqa: ANN401
    """Quantize, in place, the weights of the linear layers that diffusers quantizes when it loads such a model.

    They are moved to ``device`` one by one; all else stays where it is. Convolutions and norms are not quantized, nor
    are layers that the class of the denoiser keeps in float32.

    Args:
        denoiser: the model, on the CPU, in a dtype that holds its weights exactly; the other weights become float32.
        method: ``nf4`` or ``int8``.
        dtype: dtype of matrix products in the run; the weights are rounded to it first, as diffusers does for its
            ``torch_dtype``.
        device: device of the quantized weights.

    Returns:
        The number of quantized weights.
    """
    quantizer = DiffusersAutoQuantizer.from_config(_config(method, dtype), pre_quantized=False)
    linear = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    quantizer.preprocess_model(
        denoiser,
        device_map=None,
        keep_in_fp32_modules=list(denoiser._keep_in_fp32_modules or ()),  # noqa: SLF001
    )
    quantized = 0
    for name in list(linear):
        old, new = linear.pop(name), denoiser.get_submodule(name)
        if new is old:
            continue
        quantizer.create_quantized_param(denoiser, old.weight.detach().to(dtype), f"{name}.weight", device, {})
        quantized += old.weight.numel()
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
        new.register_forward_pre_hook(_cast_like_autocast)
        # On some CPUs bitsandbytes repacks weights at a forward without gradients, for which gradients are lost.
        new.support_avx512bf16_for_cpu = False
    # The other weights, if the denoiser was loaded in half precision; quantized weights are integers and stay.
    nn.Module.float(denoiser)
    denoiser.eval()  # new layers are in training mode
    # int8 products round their inputs to float16 on the way to 8 bits, and warn of it at each of them.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return quantized


def _config(method: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _cast_like_autocast(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:  # noqa: ARG001
    """Cast the input of a product as autocast does; it does not know these layers, whose outputs would stay float32."""
    device = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else None
