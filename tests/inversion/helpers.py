"""Pairs for the inverter, and an independent float64 version of the trajectory."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.toy.world import all_scenes, random_centre, render
from tests.models.stock import load_stock

PROMPTS = ("a cat and a dog", "dog", "", "ein Bär über Zürich", "a " * 60)


def make_pair(
    number: int, *, side: int = 32, measured: bool = True, shape: tuple[int, int] | None = None
) -> PreparedPair:
    """A pair of smooth random images, square or of a ``shape`` (height, width)."""
    stream = np.random.default_rng(number)
    coarse = stream.random((2, 4, 4, 3))
    height, width = shape or (side, side)
    pixels = np.clip(np.kron(coarse, np.ones((1, height // 4, width // 4, 1))) * 255, 0, 255).astype(np.uint8)
    return PreparedPair(
        pair_id=f"pair-{number}",
        prompt=PROMPTS[number % len(PROMPTS)],
        label=None if number % 3 == 0 else float(number % 2),
        annotator=None,
        scores={"clipscore": (0.1 * number, 0.2)},
        pixels_2HW3=pixels,
        size=((side, side), (side + 4, side)),
        crop=((0, 0), (2, 0)),
        measured=measured,
    )


def embedded_pair():
    """Images of the embedded world, whose model is smooth: its steps have solutions (a random network's need not)."""
    scenes = [all_scenes()[0], all_scenes()[70]]
    stream = np.random.default_rng(0)
    pixels = np.stack([render(scene, random_centre(scene, stream)) for scene in scenes])
    return dataclasses.replace(make_pair(0), prompt=scenes[0].caption, pixels_2HW3=pixels)


class Oracle:
    """The model in float64, one image at a time, by the formulas of the papers and nothing of ours."""

    def __init__(self, folder, prediction_type: str) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").double()
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.prediction_type = prediction_type
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).double()

    def a(self, t: int) -> float:
        return float(self.alphas_cumprod[max(t, 0)]) ** 0.5

    def s(self, t: int) -> float:
        return (1 - float(self.alphas_cumprod[max(t, 0)])) ** 0.5

    @torch.no_grad()
    def embed(self, prompt: str, *_size_and_crop) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text(tokens.input_ids)[0].double()

    @torch.no_grad()
    def output(self, x: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        return self.unet(x[None], t, encoder_hidden_states=text).sample[0]

    def noise(self, x: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        output = self.output(x, t, text)
        return {
            "epsilon": output,
            "v_prediction": self.a(t) * output + self.s(t) * x,
            "sample": (x - self.a(t) * output) / self.s(t),
        }[self.prediction_type]

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
        v = self.a(t) * noise - self.s(t) * x0
        return {"epsilon": noise, "v_prediction": v, "sample": x0}[self.prediction_type]

    def carry(self, x_s: torch.Tensor, eps: torch.Tensor, s: int, t: int) -> torch.Tensor:
        return self.a(t) * (x_s - self.s(s) * eps) / self.a(s) + self.s(t) * eps

    def step(self, x_s: torch.Tensor, s: int, t: int, text: torch.Tensor, renoise_steps: int) -> torch.Tensor:
        """ReNoise, arXiv 2403.14602: iterate, then step with the mean of the last two estimates."""
        estimates = [self.noise(x_s, t, text)]
        for _ in range(renoise_steps):
            estimates.append(self.noise(self.carry(x_s, estimates[-1], s, t), t, text))
        eps = estimates[-1] if renoise_steps == 0 else (estimates[-1] + estimates[-2]) / 2
        return self.carry(x_s, eps, s, t)

    def trajectory(self, x0: torch.Tensor, nodes: list[int], text: torch.Tensor, renoise_steps: int = 1):
        """Yield (t, x_s, s, x_t) for each node, from the first level (t = 0's noise) on."""
        x, s = x0, -1
        for t in nodes:
            x_t = self.step(x, s, t, text, renoise_steps)
            yield t, x, s, x_t
            x, s = x_t, t


class FlowOracle:
    """A flow model in float64, one image at a time: text by the stock pipeline, Euler steps, and nothing of ours."""

    def __init__(self, folder) -> None:
        self.stock = load_stock(folder)
        self.stock.shape = (32, 32)
        self.transformer = copy.deepcopy(self.stock.pipeline.transformer).double()

    def a(self, t: float) -> float:
        return 1 - max(t, 0) / 1000

    def s(self, t: float) -> float:
        return max(t, 0) / 1000

    @torch.no_grad()
    def embed(self, prompt: str, *_size_and_crop) -> dict[str, Any]:
        """The empty prompt stands for what the pipeline guides with."""
        return _double(self.stock.embed(prompt or self.stock.unconditional))

    @torch.no_grad()
    def output(self, x: torch.Tensor, t: float, text: dict[str, Any]) -> torch.Tensor:
        inputs = self.stock.inputs(x[None], torch.tensor([t], dtype=torch.float64))
        return self.stock.velocity(self.transformer(**inputs, **text).sample)[0]

    def noise(self, x: torch.Tensor, t: float, text) -> torch.Tensor:
        return x + self.a(t) * self.output(x, t, text)

    def target(self, x0: torch.Tensor, noise: torch.Tensor, _t: float) -> torch.Tensor:
        return noise - x0

    def carry(self, x_s: torch.Tensor, velocity: torch.Tensor, s: float, t: float) -> torch.Tensor:
        return x_s + (self.s(t) - self.s(s)) * velocity

    def step(self, x_s: torch.Tensor, s: float, t: float, text, renoise_steps: int) -> torch.Tensor:
        """ReNoise, arXiv 2403.14602, on velocities: iterate, then step with the mean of the last two."""
        velocities = [self.output(x_s, t, text)]
        for _ in range(renoise_steps):
            velocities.append(self.output(self.carry(x_s, velocities[-1], s, t), t, text))
        last = velocities[-2:]
        return self.carry(x_s, sum(last) / len(last), s, t)

    def trajectory(self, x0: torch.Tensor, nodes: list[float], text, renoise_steps: int = 1):
        """Yield (t, x_s, s, x_t) for each node, from sigma = 0 on."""
        x, s = x0, 0.0
        for t in nodes:
            x_t = self.step(x, s, t, text, renoise_steps)
            yield t, x, s, x_t
            x, s = x_t, t


def _double(value: Any) -> Any:
    """Cast all floating-point tensors to float64, in lists and dictionaries too."""
    if isinstance(value, dict):
        return {name: _double(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_double(each) for each in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


class PixArtOracle(Oracle):
    """The same for PixArt-Sigma: betas from 0.0001 to 0.02, and a trajectory that begins at no noise at all."""

    def __init__(self, folder, prediction_type: str) -> None:
        self.stock, self.prediction_type = load_stock(folder), prediction_type
        self.vae = self.stock.pipeline.vae
        self.transformer = copy.deepcopy(self.stock.pipeline.transformer).double()
        betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float32)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).double()

    def a(self, t: int) -> float:
        return super().a(t) if t >= 0 else 1.0

    def s(self, t: int) -> float:
        return super().s(t) if t >= 0 else 0.0

    @torch.no_grad()
    def embed(self, prompt: str, *_size_and_crop) -> dict[str, Any]:
        return _double(self.stock.embed(prompt))

    @torch.no_grad()
    def output(self, x: torch.Tensor, t: int, text: dict[str, Any]) -> torch.Tensor:
        made = self.transformer(**self.stock.inputs(x[None], torch.tensor([t])), **text).sample
        return self.stock.velocity(made)[0]


class OracleXL(Oracle):
    """The same for Stable Diffusion XL: its pipeline encodes, and says what stands for the empty prompt."""

    def __init__(self, folder, prediction_type: str) -> None:
        super().__init__(folder, prediction_type)
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        self.target_size = (32, 32)

    @torch.no_grad()
    def embed(self, prompt: str, size=(32, 32), crop=(0, 0)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(prompt or "anything", device="cpu")
        if not prompt:
            text, pooled = negative, negative_pooled
        return text.double(), pooled.double(), torch.tensor([[*size, *crop, *self.target_size]]).double()

    @torch.no_grad()
    def output(self, x: torch.Tensor, t: int, text) -> torch.Tensor:
        states, pooled, time_ids = text
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(x[None], t, encoder_hidden_states=states, added_cond_kwargs=added).sample[0]
