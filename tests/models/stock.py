"""Stock pipelines of flow models: how each is called, and what its calls of the denoiser mean.

Only what the pipelines themselves do; nothing here uses ``smpo_models``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

SHAPE = (32, 64)
"""Height and width of all images; Sana's pipeline takes multiples of 32."""


class Stock:
    """A pipeline without packing, which guides by a second half of its batch: SD3's.

    Attributes:
        mask: the denoiser's name of the mask of its text, where it takes one.
        positional: the denoiser's names of what the pipeline gives it by position.
        unconditional: what the pipeline guides with.
        shape: height and width of images.
    """

    mask: str | None = None
    positional: tuple[str, ...] = ()
    unconditional = ""
    shape = SHAPE

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline

    def options(self, guidance: float, images: int) -> dict[str, Any]:  # noqa: ARG002
        """Arguments that guide so."""
        return {"guidance_scale": guidance}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the pipeline takes them."""
        return latents

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`pack`; also the denoiser's."""
        return hidden_states

    def noisy(self, call: dict[str, Any]) -> torch.Tensor:
        """Latents [B, C, h, w] that the denoiser is given."""
        return self.unpack(call["hidden_states"])

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, C, h, w] of what ``output_type="latent"`` gives."""
        return self.unpack(latents)

    def velocity(self, output: Any) -> torch.Tensor:
        """What the pipeline hands to its scheduler for an output of the denoiser, unpacked."""
        return self.unpack(output)

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:
        """The prompts of each forward of a step; None: the unconditional one."""
        return [[None] * len(prompts) + prompts] if guidance > 1 else [prompts]

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        """Velocity under guidance."""
        return unconditional + guidance * (conditional - unconditional)

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, normalised as the pipelines do it."""
        found, config = self.pipeline.vae.encode(pixels).latent_dist, self.pipeline.vae.config
        return (found.mean - config.shift_factor) * config.scaling_factor, found.std * config.scaling_factor

    def embed(self, prompt: str) -> dict[str, Any]:
        """The denoiser's arguments that stand for a prompt."""
        text, _, pooled, _ = self.pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        """The denoiser's other arguments, of unpacked latents and t in [0, 1000)."""
        return {"hidden_states": x, "timestep": t}

    def given(self, call: dict[str, Any]) -> dict[str, Any]:
        """What a denoiser is given, but for padding that it is told to ignore."""
        if self.mask not in call:
            return call
        mask = call[self.mask].bool()
        length = int(mask.sum(1).max())
        text = (call["encoder_hidden_states"] * mask[..., None])[:, :length]
        return call | {"encoder_hidden_states": text, self.mask: mask[:, :length]}

    def run(self, prompts: list[str], noise: torch.Tensor, guidance: float, steps: int, output_type: str = "latent"):
        """Sample from unpacked noise; latents come back unpacked and normalised."""
        height, width = self.shape
        made = self.pipeline(
            prompt=list(prompts),  # Z-Image's writes into it
            latents=self.pack(noise),
            height=height,
            width=width,
            num_inference_steps=steps,
            output_type=output_type,
            **self.options(guidance, len(prompts)),
        ).images
        return self.result(made) if output_type == "latent" else made


class StockFlux(Stock):
    """FLUX.1's: packed latents; dev's denoiser is told the scale."""

    def options(self, guidance: float, images: int) -> dict[str, Any]:
        length = 512 if self.pipeline.transformer.config.guidance_embeds else 256
        return super().options(guidance, images) | {"max_sequence_length": length}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pipeline._unpack_latents(hidden_states, *self.shape, self.pipeline.vae_scale_factor)

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:  # noqa: ARG002
        return [prompts]

    def embed(self, prompt: str) -> dict[str, Any]:
        text, pooled, ids = self.pipeline.encode_prompt(prompt)
        return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        height, width = x.shape[-2:]
        ids = self.pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", x.dtype)
        guidance = torch.ones_like(t) if self.pipeline.transformer.config.guidance_embeds else None
        return {"hidden_states": self.pack(x), "timestep": t / 1000, "img_ids": ids, "guidance": guidance}


class StockQwenImage(Stock):
    """Qwen-Image's: another forward guides, where there is a negative prompt; the norm of each token is kept."""

    mask = "encoder_hidden_states_mask"
    unconditional = " "

    def options(self, guidance: float, images: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [self.unconditional] * images}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pipeline._unpack_latents(hidden_states, *self.shape, self.pipeline.vae_scale_factor)[:, :, 0]

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:
        return [prompts, [None] * len(prompts)] if guidance > 1 else [prompts]

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        own, combined = self.pack(conditional), self.pack(super().guided(conditional, unconditional, guidance))
        return self.unpack(combined * (own.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)))

    def embed(self, prompt: str) -> dict[str, Any]:
        text, mask = self.pipeline.encode_prompt(prompt, max_sequence_length=512)
        return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        height, width = x.shape[-2:]
        shapes = [[(1, height // 2, width // 2)]] * len(x)
        return {"hidden_states": self.pack(x), "timestep": t / 1000, "img_shapes": shapes}

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self.pipeline.vae
        found = vae.encode(pixels[:, :, None]).latent_dist
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (found.mean[:, :, 0] - mean) / std, found.std[:, :, 0] / std


class StockKlein(Stock):
    """FLUX.2-klein's: its latents are the VAE's own again where they come back."""

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        sides = [side // (2 * self.pipeline.vae_scale_factor) for side in self.shape]
        return hidden_states.permute(0, 2, 1).reshape(len(hidden_states), -1, *sides)

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None]
        return (self.pipeline._patchify_latents(latents) - vae.bn.running_mean[:, None, None]) / std

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:
        return [prompts, [None] * len(prompts)] if guidance > 1 else [prompts]

    def embed(self, prompt: str) -> dict[str, Any]:
        text, ids = self.pipeline.encode_prompt(prompt)
        return {"encoder_hidden_states": text, "txt_ids": ids}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        ids = self.pipeline._prepare_latent_ids(x)
        return {"hidden_states": self.pipeline._pack_latents(x), "timestep": t / 1000, "img_ids": ids}

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.pipeline._encode_vae_image(pixels, None)
        return mean, torch.zeros_like(mean)


class StockPixArt(Stock):
    """PixArt-Sigma's: half of the output is a variance; without its table of sizes and further packages' cleaning."""

    mask = "encoder_attention_mask"
    positional = ("hidden_states",)

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        # Of the linspace timesteps of its own, DDIM's steps do not lead from one to the next.
        changed = {"clip_sample": False, "timestep_spacing": "trailing"}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changed)

    def options(self, guidance: float, images: int) -> dict[str, Any]:
        return super().options(guidance, images) | {"use_resolution_binning": False, "clean_caption": False}

    def velocity(self, output: torch.Tensor) -> torch.Tensor:
        return output[:, : self.pipeline.transformer.config.in_channels]

    def embed(self, prompt: str) -> dict[str, Any]:
        text, mask, _, _ = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, scale = self.pipeline.vae.encode(pixels).latent_dist, self.pipeline.vae.config.scaling_factor
        return found.mean * scale, found.std * scale


class StockZImage(Stock):
    """Z-Image's: lists of images and texts, a negated output, unguided at scale 0, the prompts first."""

    positional = ("x", "t", "cap_feats")

    def options(self, guidance: float, images: int) -> dict[str, Any]:
        return super().options(guidance - 1, images)

    def noisy(self, call: dict[str, Any]) -> torch.Tensor:
        return torch.stack(call["x"]).squeeze(2)

    def velocity(self, output: list[torch.Tensor]) -> torch.Tensor:
        return -torch.stack(output).squeeze(2)

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:
        return [prompts + [None] * len(prompts)] if guidance > 1 else [prompts]

    def embed(self, prompt: str) -> dict[str, Any]:
        (text,), _ = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"cap_feats": [text]}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        return {"x": list(x.unsqueeze(2)), "t": (1000 - t) / 1000}

    def given(self, call: dict[str, Any]) -> dict[str, Any]:
        texts = {f"encoder_hidden_states {number}": text for number, text in enumerate(call["cap_feats"])}
        return {"x": torch.stack(call["x"]), "t": call["t"], **texts}


class StockSana(Stock):
    """Sana's: a multistep solver, here of first order; an autoencoder without posterior; without its table of sizes."""

    mask = "encoder_attention_mask"
    positional = ("hidden_states",)

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        config = pipeline.scheduler.config
        if "solver_order" in config:
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1)

    def options(self, guidance: float, images: int) -> dict[str, Any]:
        return super().options(guidance, images) | {"use_resolution_binning": False}

    def embed(self, prompt: str) -> dict[str, Any]:
        """The empty prompt is the negative one, which has no instruction."""
        default = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        made = self.pipeline.encode_prompt(prompt, complex_human_instruction=default)
        text, mask = made[:2] if prompt else made[2:]
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": t.long()}

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.pipeline.vae.encode(pixels).latent * self.pipeline.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)


class StockLumina2(Stock):
    """Lumina 2's: time from noise to image, a negated output, another forward to guide by; rows keep their norm."""

    mask = "encoder_attention_mask"

    def velocity(self, output: torch.Tensor) -> torch.Tensor:
        return -output

    def forwards(self, prompts: list[str], guidance: float) -> list[list[str | None]]:
        return [prompts, [None] * len(prompts)] if guidance > 1 else [prompts]

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        combined = super().guided(conditional, unconditional, guidance)
        return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def embed(self, prompt: str) -> dict[str, Any]:
        """The empty prompt is the negative one, which has no system prompt."""
        made = self.pipeline.encode_prompt(prompt)
        text, mask = made[:2] if prompt else made[2:]
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def inputs(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": 1 - t / 1000}


_STOCK = {
    "StableDiffusion3Pipeline": Stock,
    "FluxPipeline": StockFlux,
    "QwenImagePipeline": StockQwenImage,
    "Flux2KleinPipeline": StockKlein,
    "PixArtSigmaPipeline": StockPixArt,
    "ZImagePipeline": StockZImage,
    "SanaPipeline": StockSana,
    "Lumina2Pipeline": StockLumina2,
}


def load_stock(folder, *, own_scheduler: bool = False, **parts) -> Stock:
    """Load a folder's own pipeline, with its own scheduler or the first-order one."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    scheduler = pipeline.scheduler
    stock = _STOCK[type(pipeline).__name__](pipeline)
    if own_scheduler:
        pipeline.scheduler = scheduler
    return stock
