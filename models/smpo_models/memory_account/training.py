"""Calculate what ``smpo-train`` needs: GPU memory for an optimizer step, and disk space for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from smpo_models.arithmetic import narrow_products
from smpo_models.family import Family
from smpo_models.memory_account.backward import SavedForBackward
from smpo_models.memory_account.fake import Inputs, fake_arithmetic, make_fake
from smpo_models.memory_account.quantized import quantize
from smpo_models.tuned.lora import add_lora
from smpo_models.weights import DTYPES
from smpo_schemas.choices import Dtype, OptimizerName, Quantization

_FLOAT = torch.float32.itemsize
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
"""bitsandbytes keeps the moments of smaller tensors in float32; of others, blocks of these share one float32 scale."""


@dataclass(frozen=True)
class TrainingRun:
    """A run of ``smpo-train`` in one process without FSDP, by its flags.

    Attributes:
        height, width: of the images, in pixels.
        batch_size: states of a micro-batch, two images each.
        dtype: of products.
        lora_rank: of the adapter; None: all weights are trained.
        quantize: how the frozen weights below an adapter are quantized.
        gradient_checkpointing: whether each block's activations are recomputed in the backward pass.
        accumulates: whether a step has several micro-batches.
        optimizer: name of the optimizer.
        averages: whether a moving average of the weights is kept.
        holds_text: whether the text encoders are in memory (shards without stored text).
        gpu: follow the arithmetic of a GPU; else a CPU's.
    """

    height: int
    width: int
    batch_size: int = 8
    dtype: Dtype = "bf16"
    lora_rank: int | None = None
    quantize: Quantization | None = None
    gradient_checkpointing: bool = False
    accumulates: bool = False
    optimizer: OptimizerName = "adamw"
    averages: bool = False
    holds_text: bool = False
    gpu: bool = True


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a step, by what they are for; and of a checkpoint on disk.

    Attributes:
        weights: weights of the denoiser, adapter included.
        text_encoders: weights of the text encoders, if they are held.
        optimizer: the optimizer's state, and the moving average of the weights.
        gradients: gradients of the trained weights.
        activations: the rest of the peak: tensors saved for the backward pass and gradients of activations.
        trained: number of trained weights (not bytes).
        checkpoint: a checkpoint's folder: the trained weights in float32, the optimizer's state and, with a moving
            average, the weights once more.
        result: the trained weights alone.
    """

    weights: int
    text_encoders: int
    optimizer: int
    gradients: int
    activations: int
    trained: int
    checkpoint: int
    result: int

    @property
    def total(self) -> int:
        """Bytes of GPU memory in all."""
        return self.weights + self.text_encoders + self.optimizer + self.gradients + self.activations


def account_training(family: Family, run: TrainingRun) -> TrainingMemory:
    """Calculate the memory of a run.

    Args:
        family: loaded without any part, or with the text encoders, on any device, if the run holds them.
        run: what is trained, and how.
    """
    dtype = DTYPES[run.dtype]
    denoiser, temporary = prepare_denoiser(family, run)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    gradients = tensor_bytes(trained)
    state = sum(state_bytes(run.optimizer, tuple(parameter.shape)) for parameter in trained)
    average = gradients if run.averages else 0
    with fake_arithmetic(gpu=run.gpu):
        make_fake(denoiser)
        inputs = Inputs.make(family, run.height, run.width, 2 * run.batch_size)
        saved = SavedForBackward(denoiser, recomputes=run.gradient_checkpointing)
        with saved.recording():
            loss = mean_error(family, denoiser, inputs, dtype)
        casts = cast_bytes(denoiser, dtype) if run.gradient_checkpointing else 0
        backward = saved.backward_peak(loss, accumulates=run.accumulates)
        # Autocast keeps the casts of trained weights until the forward ends.
        ahead = saved.num_bytes + casts + (gradients if run.accumulates else 0)
    largest = max((parameter.numel() for parameter in trained), default=0) * _FLOAT
    update = gradients + (2 * largest if run.optimizer == "adafactor" else 0)
    peak = max(inputs.num_bytes + max(backward + temporary, ahead), update)
    return TrainingMemory(
        weights=tensor_bytes([*denoiser.parameters(), *denoiser.buffers()]),
        text_encoders=sum(tensor_bytes(module.parameters()) for module in family.text_modules) if run.holds_text else 0,
        optimizer=state + average,
        gradients=gradients,
        activations=peak - gradients,
        trained=sum(parameter.numel() for parameter in trained),
        checkpoint=gradients + state + average,
        result=gradients,
    )


def prepare_denoiser(family: Family, run: TrainingRun) -> tuple[nn.Module, int]:
    """Return the denoiser as training prepares it, on the meta device; and the largest dequantized weight's bytes."""
    denoiser, temporary = family.empty_denoiser().requires_grad_(False).eval(), 0
    if run.quantize:
        temporary = quantize(denoiser, run.quantize, DTYPES[run.dtype])
    if run.lora_rank is not None:
        add_lora(denoiser, family.lora_targets, run.lora_rank, idle=family.idle_layers)
        for layer in denoiser.modules():
            if run.quantize and isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = False  # as in PEFT's adapters of quantized layers under autocast
    else:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(not name.startswith(family.idle_layers))
    narrow_products(denoiser, DTYPES[run.dtype])
    return denoiser, temporary


def mean_error(family: Family, denoiser: nn.Module, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean error of a micro-batch; call it within :func:`fake_arithmetic`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output_RChw = family.denoise(denoiser, inputs.x_RChw, inputs.t_R, inputs.conditioning)
        return (output_RChw - inputs.x_RChw).square().mean()


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of tensors; a tensor that occurs twice counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(each): each for each in tensors}.values())


def cast_bytes(denoiser: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that autocast's copies of the trained weights take in ``dtype``."""
    if dtype == torch.float32:
        return 0
    products = (module for module in denoiser.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d))
    weights = (weight for module in products for weight in module.parameters(recurse=False) if weight.requires_grad)
    return sum(weight.numel() for weight in weights) * dtype.itemsize


def state_bytes(optimizer: OptimizerName, shape: tuple[int, ...]) -> int:
    """Return the bytes of the optimizer's state for one trained tensor in float32."""
    count = math.prod(shape)
    if optimizer == "adafactor":  # the second moment; for matrices only its sums over rows and over columns
        return _FLOAT * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if optimizer == "adamw8bit" and count >= _EIGHT_BIT_FROM:
        return 2 * (count + _FLOAT * -(-count // _EIGHT_BIT_BLOCK))
    return 2 * _FLOAT * count
