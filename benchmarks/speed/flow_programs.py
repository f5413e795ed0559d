"""The programs whose training step of a flow model is measured: Flow-DPO as scripts do it, and `smpo-train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from torch.nn import functional

from benchmarks.speed.clock import Clock
from benchmarks.speed.train import PROMPT, SIDE
from smpo_models.families.flux import Flux
from smpo_trainer import TrainSettings, run_training, trainer

RANK = 16
"""Of the LoRA on the real model; divided with the widths."""

BETA = 2000.0
STEPS = 6
"""Of which the first is not counted."""


def flow_dpo(model: Path, method: str, divide: int, clock: Clock) -> None:
    """Take the steps of the usual loop, by parts."""
    pipe = FluxPipeline.from_pretrained(model)
    policy = pipe.transformer
    for module in (policy, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False)
    if method == "LoRA":
        policy.add_adapter(lora(divide))
        reference = policy
    else:
        reference = copy.deepcopy(policy)
        policy.requires_grad_(True)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-8)
    pixels = torch.rand(2, 3, 8 * SIDE, 8 * SIDE) * 2 - 1

    def errors(denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (denoiser(**inputs).sample - target).square().mean(dim=(1, 2))

    def step() -> None:
        with torch.no_grad():
            inputs, target = noised_inputs(pipe, pixels, clock)
            with clock.part("reference"):
                if method == "LoRA":
                    policy.disable_adapters()
                expected = errors(reference, inputs, target)
                if method == "LoRA":
                    policy.enable_adapters()
        with clock.part("forward"):
            error = errors(policy, inputs, target)
        (won, lost) = error - expected
        loss = -functional.logsigmoid(-(BETA / 2) * (won - lost))
        with clock.part("backward"):
            loss.backward()
        with clock.part("clipping and AdamW"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(STEPS):
        with clock.step():
            step()


def noised_inputs(
    pipe: FluxPipeline, pixels: torch.Tensor, clock: Clock
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Make the transformer's inputs for both images of a pair, and its packed target, as diffusers' scripts do."""
    with clock.part("VAE"):
        x0 = pipe.vae.encode(pixels).latent_dist.sample()
        x0 = (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    with clock.part("text encoders"):
        text, pooled, text_ids = pipe.encode_prompt(PROMPT, PROMPT)
    noise = torch.randn_like(x0[:1]).repeat(2, 1, 1, 1)
    u = compute_density_for_timestep_sampling("logit_normal", 1, logit_mean=0.0, logit_std=1.0)
    sigma = pipe.scheduler.sigmas[(u * pipe.scheduler.config.num_train_timesteps).long()]
    x = (1 - sigma) * x0 + sigma * noise
    _, channels, height, width = x0.shape
    inputs = {
        "hidden_states": pipe._pack_latents(x, 2, channels, height, width),  # noqa: SLF001  (as scripts do)
        "timestep": sigma.repeat(2),
        "guidance": torch.ones(2),
        "pooled_projections": pooled.repeat(2, 1),
        "encoder_hidden_states": text.repeat(2, 1, 1),
        "txt_ids": text_ids,
        "img_ids": pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", x0.dtype),  # noqa: SLF001
    }
    return inputs, pipe._pack_latents(noise - x0, 2, channels, height, width)  # noqa: SLF001


def ours(work: Path, method: str, divide: int, clock: Clock) -> None:
    """Run smpo-train in this process, its steps measured by parts."""
    loop = trainer.Trainer
    whole_step = loop.train_step

    def measured_step(*arguments: object) -> Any:  # noqa: ANN401
        with clock.step():
            return whole_step(*arguments)

    with (
        mock.patch.object(loop, "train_step", measured_step),
        mock.patch.object(trainer, "pair_outputs", clock.timed("forward", trainer.pair_outputs)),
        mock.patch.object(Accelerator, "backward", clock.timed("backward", Accelerator.backward)),
        mock.patch.object(loop, "_update", clock.timed("clipping and AdamW", loop._update)),  # noqa: SLF001
    ):
        run_training(settings_of(work, method, divide))


def settings_of(work: Path, method: str, divide: int) -> TrainSettings:
    """Settings of `smpo-train`."""
    settings = TrainSettings(shards=(str(work / "shards"),), model=str(work / "model"), out=work / "run")
    return settings.replace(
        overwrite=True, device="cpu", batch_size=1, max_steps=STEPS, warmup_steps=0, lr=1e-8, beta=BETA,
        reference="stored", lora_rank=RANK // divide if method == "LoRA" else None,
    )  # fmt: skip


def lora(divide: int) -> LoraConfig:
    """Make the adapter that `smpo-train` makes, too."""
    rank = RANK // divide
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(Flux.lora_targets))
