"""The settings of an inversion, as the manifest records them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from smpo_common.errors import UserError
from smpo_schemas.choices import Dtype
from smpo_schemas.frozen import FrozenModel

GENERATED = ("tracked", "sampled")
"""Sources that use the latents stored by ``generate --keep`` in place of the images."""

TRUNCATED = {"steps": 25, "guidance_scale": 0.0, "states": 9, "timesteps": "grid"}
"""Defaults of the source ``truncated`` that differ from those of the others. It makes no use of ``timesteps``."""


class InversionSettings(FrozenModel):
    """Everything that determines the stored states, besides the model, the pairs and the seed.

    Attributes:
        source: ``renoise``: trajectories of ReNoise inversion (arXiv 2403.14602); ``forward``: independent Gaussian
            noise; ``tracked``: the noise that ``generate`` made each image from, added to the sampler's final latent
            (arXiv 2605.09433); ``sampled``: the sampler's own states; ``truncated``: x_t after a few of the sampler's
            steps, noised further, with the model's estimate at x_t as x0 (Self-NPO, arXiv 2505.11777); ``steps``: two
            draws of the sampler's step from one state, made by `smpo-pipeline steps` (TailorPO, arXiv 2502.01667; see
            :class:`smpo_schemas.manifest.StepSettings`).
        forward_noise: for ``forward``: both images of a ``pair`` get the same noise (Diffusion-DPO), or each ``image``
            its own (CaPO).
        start: where a trajectory begins: ``clean`` (x0 itself), ``level0`` (x0 noised to the scheduler's first level),
            or a timestep: up to it, states are made by adding noise to x0.
        timesteps: ``jittered`` (one uniform draw in each of ``steps`` equal strata), ``grid`` (the scheduler's own
            inference grid; for ``sampled`` those of its timesteps at which states were kept) or ``published`` (the
            state of the grid's first node at or above a uniform t, or of its last node, used as if it were at t; each
            step evaluates the model at the timestep that it starts from).
        steps: steps per trajectory; for ``sampled`` the kept states of an image; for ``truncated`` those of the
            sampler's whole grid.
        truncated_steps: for ``truncated``: number of the sampler's steps before x0 is estimated.
        truncated_from: for ``truncated``: the sampler begins at the ``image``, noised to a random timestep of the grid,
            or at pure ``noise``.
        solver: how a step's implicit equation is solved: ``ddim`` (one evaluation, no solving), ``renoise`` (a fixed
            number of iterations), ``adaptive`` (iterated to convergence) or ``anderson`` (the same, accelerated).
        renoise_steps: for ``renoise``: iterations per step, each one evaluation besides the initial one; 0 is DDIM
            inversion.
        renoise_average: for ``renoise``: which of the step's ``renoise_steps`` + 1 estimates are averaged; see
            :func:`averaged_estimates`.
        tolerance: for ``adaptive`` and ``anderson``: stop iterating an image's step at this residual.
        max_evaluations: for ``adaptive`` and ``anderson``: limit of evaluations for an image's step.
        anderson_depth: for ``anderson``: number of previous differences that the acceleration uses.
        eta: scale of the Gaussian noise added after each step, in DDIM posterior standard deviations
            (DDIM-InPO, arXiv 2503.18454); for ``steps``, eta of the sampler.
        guidance_scale: classifier-free guidance of the inverting denoiser; 1 is none, 0 the unconditional model.
        states: number of a trajectory's states that are stored, drawn per trajectory; None is all.
        trajectories: inversions of each pair, each with its own draws.
        vae_latent: ``sample`` the VAE's posterior or take its ``mode``.
        prompt_dropout: probability that a trajectory uses the empty prompt, in inversion and training.
        empty_prompt: ``model``: the embedding that the model's own pipeline uses for guidance (zeros for SDXL);
            ``encoded``: the text encoders' output for "", as in SmPO's published SDXL code.
        hflip: whether half of the trajectories mirror both images.
        size_conditioning: for models with size conditioning (SDXL): ``image``: each image's original size and crop;
            ``constant``: the resolution and no crop for all, as in the published code.
        storage: dtype of stored latents and noise; ``ref_error`` is measured after this rounding. A manifest without
            this key means ``float16``.
        text: ``stored``: each prompt is encoded once, rounded to ``dtype`` and stored, for inversion and training;
            ``live``: both encode prompts themselves.
        buckets: whether images are resized by aspect ratio to one of several sizes of about the resolution's area,
            instead of to a square.
        dtype: dtype of the inverting denoiser's forward passes, and of the matrix products in the reference's.
    """

    source: Literal["renoise", "forward", "tracked", "sampled", "truncated", "steps"] = "renoise"
    forward_noise: Literal["pair", "image"] = "pair"
    start: Literal["clean", "level0"] | int = "clean"
    timesteps: Literal["jittered", "grid", "published"] = "jittered"
    steps: int = Field(default=9, ge=1)
    truncated_steps: int = Field(default=5, ge=0)
    truncated_from: Literal["image", "noise"] = "image"
    solver: Literal["ddim", "renoise", "adaptive", "anderson"] = "renoise"
    renoise_steps: int = Field(default=1, ge=0)
    renoise_average: str = "last2"
    tolerance: float = Field(default=1e-4, gt=0)
    max_evaluations: int = Field(default=30, ge=1)
    anderson_depth: int = Field(default=3, ge=1)
    eta: float = Field(default=0.0, ge=0)
    guidance_scale: float = Field(default=1.0, ge=0)
    states: int | None = Field(default=None, ge=1)
    trajectories: int = Field(default=1, ge=1)
    vae_latent: Literal["sample", "mode"] = "sample"
    prompt_dropout: float = Field(default=0.2, ge=0, le=1)
    empty_prompt: Literal["model", "encoded"] = "model"
    hflip: bool = True
    size_conditioning: Literal["image", "constant"] = "image"
    storage: Literal["float16", "bfloat16"] = "float16"
    text: Literal["stored", "live"] = "live"
    buckets: bool = False
    dtype: Dtype = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_source(cls, values: Any) -> Any:  # noqa: ANN401  (what is validated)
        if not isinstance(values, dict) or values.get("source") != "truncated":
            return values
        return {**TRUNCATED, **{name: value for name, value in values.items() if value is not None}}


def averaged_estimates(text: str, renoise_steps: int) -> frozenset[int]:
    """Parse which of ReNoise's estimates e_0 .. e_renoise_steps are averaged.

    Args:
        text: ``all``, ``lastN`` (all if there are fewer than N estimates) or their numbers, as in ``0,1``.
        renoise_steps: number of iterations.

    Raises:
        UserError: the text is malformed, or names an estimate above ``renoise_steps``.
    """
    if text == "all":
        return frozenset(range(renoise_steps + 1))
    if text.startswith("last") and text[4:].isdecimal() and int(text[4:]) > 0:
        return frozenset(range(max(0, renoise_steps + 1 - int(text[4:])), renoise_steps + 1))
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) <= renoise_steps for part in parts):
        raise UserError(
            f"--renoise-average {text}: give all, lastN (for example last2) or numbers from 0 to {renoise_steps} "
            f"(for example 0,1); --renoise-steps {renoise_steps} makes {renoise_steps + 1} estimates"
        )
    return frozenset(int(part) for part in parts)
