"""Compare the models' outputs in each arithmetic with float64 on the same device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import PROMPT, World, conditioned, latents
from smpo_models.family import Conditioning, Family
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.model.denoising_error import pair_errors

LIMITS = {"float32": 2e-5, "tf32": 3e-3, "fp16": 1e-2, "bf16": 3e-2}
"""Relative L2 distances from float64."""

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_numbers(world: World, report: Report) -> None:
    """Check SD 1.5: UNet, VAE, text encoder, errors of pairs, gradients."""
    family = world.load("sd15")
    denoiser_numbers(world, report, family, "sd15", LIMITS)
    _autoencoder(world, report, family)
    _text(world, report, family)
    family.vae, family.text_modules = None, ()
    _gradients(world, report, family, conditioned(world, world.load("sd15", ("text",)), "sd15", 2))


def check_xl_numbers(world: World, report: Report) -> None:
    """Check SDXL's UNet in half precision."""
    family = world.load("sdxl", ("denoiser", "text"))
    denoiser_numbers(world, report, family, "sdxl", tuple(HALF))


def denoiser_numbers(world: World, report: Report, family: Family, shape: str, names: Iterable[str]) -> None:
    """Judge two rows of the denoiser in each arithmetic of ``names``, and under autocast to the half precisions."""
    x, seen = latents(world, shape, 2), conditioned(world, family, shape, 2)
    t = torch.tensor([100, 700], device=world.device.name)
    denoiser = family.denoiser

    @torch.no_grad()
    def run(module: nn.Module) -> torch.Tensor:
        return family.denoise(module, x, t, seen).double()

    exact = run(copy.deepcopy(denoiser).double())
    for name, context, dtype in arithmetics(world, names):
        with context:
            found = run(denoiser if dtype is None else copy.deepcopy(denoiser).to(dtype))
        report.judge(f"UNet {name}", distance(found, exact), most=LIMITS[name])
    for name, dtype in HALF.items():
        with torch.autocast(world.device.name, dtype):
            found = run(denoiser)
        report.judge(f"UNet autocast {name}", distance(found, exact), most=LIMITS[name])


def arithmetics(
    world: World, names: Iterable[str]
) -> Iterator[tuple[str, AbstractContextManager[object], torch.dtype | None]]:
    """Return, by name, the context to compute in, and the dtype to cast weights to (or None)."""
    known = {"float32": (nullcontext(), None), "tf32": (world.device.tf32(), None)}
    known |= {name: (nullcontext(), dtype) for name, dtype in HALF.items()}
    yield from ((name, *known[name]) for name in names)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _autoencoder(world: World, report: Report, family: Family) -> None:
    """Judge the VAE's mean as stored in float16, with float32, TF32 and bfloat16 weights."""
    side = world.pixels("sd15")
    stream = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, side, side, generator=stream).to(world.device.name) * 2 - 1

    @torch.no_grad()
    def run(vae: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return vae.encode(pixels.to(dtype)).latent_dist.mean.double()

    exact = run(copy.deepcopy(family.vae).double(), torch.float64)
    scale = family.vae.config["scaling_factor"]
    stored = {}
    for name, context, dtype in arithmetics(world, ("float32", "tf32", "bf16")):
        with context:
            vae = family.vae if dtype is None else copy.deepcopy(family.vae).to(dtype)
            found = run(vae, dtype or torch.float32)
        stored[name] = (found * scale).half()
        report.judge(f"VAE {name}", distance(found, exact), most=LIMITS[name])
    for name in ("tf32", "bf16"):
        apart = _steps(stored[name]) - _steps(stored["float32"])
        share = float((apart.abs() <= 1).double().mean())
        report.note(**{f"VAE {name}: equal as float16": float((apart == 0).double().mean())})
        report.note(**{f"VAE {name}: within 1 ulp": share})
        if name == "tf32":
            report.judge("VAE tf32: share within 1 ulp", share, least=0.95)


def _steps(half: torch.Tensor) -> torch.Tensor:
    """Map float16 values to integers that count representable values."""
    bits = half.view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


@torch.no_grad()
def _text(world: World, report: Report, family: Family) -> None:
    plain = family.text_modules

    def run(dtype: torch.dtype | None) -> torch.Tensor:
        family.text_modules = plain if dtype is None else tuple(copy.deepcopy(each).to(dtype) for each in plain)
        return family.encode_text([PROMPT])["text"]

    exact = run(torch.float64)
    for name, context, dtype in arithmetics(world, ("float32", "tf32", "bf16")):
        with context:
            found = run(dtype)
        report.judge(f"text {name}", distance(found, exact), most=LIMITS[name])


def _gradients(world: World, report: Report, family: Family, seen: Conditioning) -> None:
    """Check that errors stay float32 under autocast, and that bfloat16's gradient points where float32's does."""
    denoiser = family.denoiser.requires_grad_(True)
    batch = random_states(world, "sd15", 1)

    def gradient(context: Callable[[], AbstractContextManager[object]]) -> tuple[torch.Tensor, torch.dtype]:
        with context():
            error = pair_errors(family, denoiser, batch, seen)
        error.sum().backward()
        found = torch.cat([each.grad.flatten() for each in denoiser.parameters()])
        denoiser.zero_grad()
        return found, error.dtype

    exact, _ = gradient(nullcontext)
    half, dtype = gradient(lambda: torch.autocast(world.device.name, torch.bfloat16))
    report.judge("pair_errors under autocast are float32", dtype == torch.float32, least=1)
    cosine = float(torch.nn.functional.cosine_similarity(half, exact, dim=0))
    report.judge("gradient bf16: cosine", cosine, least=0.99)
    report.judge("gradient bf16: norm", float(half.norm() / exact.norm()), least=0.97, most=1.03)


def random_states(world: World, shape: str, count: int) -> StateBatch:
    """Draw a micro-batch of Gaussian latents on the device."""
    side = world.pixels(shape)
    x0, noise = latents(world, shape, 2, count, 2).half()
    ones = torch.ones(count, device=world.device.name)
    return StateBatch(
        pair_ids=[str(number) for number in range(count)],
        prompts=[PROMPT] * count,
        sizes=[((side, side),) * 2] * count,
        crops=[((0, 0),) * 2] * count,
        x0_B2Chw=x0,
        noise_B2Chw=noise,
        ref_error_B2=torch.ones(count, 2, device=world.device.name),
        timestep_B=torch.full((count,), 500, device=world.device.name),
        preference_B=0.4 * ones,
        label_B=ones,
        weight_B=ones,
    )
