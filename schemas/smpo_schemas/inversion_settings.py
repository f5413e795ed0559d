"""The settings of an inversion: what decides what is stored, besides the model, the pairs and the seed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from smpo_common.errors import UserError
from smpo_schemas.dtypes import Dtype


class InversionSettings(BaseModel):
    """Everything that decides what is stored, besides the model, the pairs and the seed.

    Attributes:
        source: ``renoise``: trajectories of ReNoise inversion (arXiv 2403.14602); ``forward``: independent Gaussian
            noise.
        forward_noise: ``forward``: whether both images of a ``pair`` get the same noise (Diffusion-DPO), or each
            ``image`` its own (CaPO).
        start: where a trajectory begins: ``clean`` (x0 itself), ``level0`` (x0 noised to the scheduler's first level),
            or a timestep up to which nodes are reached by forward noising.
        timesteps: ``jittered`` (one uniform draw in each of ``steps`` equal strata), ``grid`` (the scheduler's own
            inference grid) or ``published`` (state of the grid's first node at or above a uniform t, or of its last
            one, used as if at t; each step asks the model at the timestep that it starts from).
        steps: number of steps of a trajectory.
        solver: how a trajectory's step is solved: ``ddim`` (not at all), ``renoise`` (a fixed number of iterations),
            ``adaptive`` (iterated until it has converged) or ``anderson`` (the same, accelerated).
        renoise_steps: ``renoise``: iterations a step, one evaluation each after the first; 0 is DDIM inversion.
        renoise_average: ``renoise``: which of the step's ``renoise_steps`` + 1 estimates are averaged; see
            :func:`averaged_estimates`.
        tolerance: ``adaptive``, ``anderson``: residual at which an image's step is done.
        max_evaluations: ``adaptive``, ``anderson``: evaluations after which an image's step ends as it is.
        anderson_depth: ``anderson``: differences that the acceleration looks back on.
        eta: scale of the Gaussian noise added after each step, in DDIM posterior standard deviations
            (DDIM-InPO, arXiv 2503.18454).
        guidance_scale: classifier-free guidance of the inverting denoiser; 1 is none.
        states: how many of a trajectory's states are stored, drawn for each trajectory; None is all.
        trajectories: how many times each pair is inverted, each with its own draws.
        vae_latent: ``sample`` the VAE's posterior or take its ``mode``.
        prompt_dropout: probability that a trajectory is made, and trained, under the empty prompt.
        empty_prompt: ``model``: the embedding that the model's own pipeline guides with (zeros for SDXL);
            ``encoded``: what the text encoders make of "", as SmPO's published SDXL code.
        hflip: whether half of the trajectories mirror both images.
        size_conditioning: of models that are conditioned on sizes (SDXL): ``image``: each image's own original size and
            crop; ``constant``: the resolution and no crop for all, as the published code.
        storage: what latents and noise are rounded to, before ``ref_error`` is measured; directories that do not say
            it have ``float16``.
        buckets: whether images are brought to one of several sizes of about the resolution's area, by their aspect
            ratio, rather than to the square.
        dtype: of the inverting denoiser's forward passes, and of the products in the reference's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: Literal["renoise", "forward"] = "renoise"
    forward_noise: Literal["pair", "image"] = "pair"
    start: Literal["clean", "level0"] | int = "clean"
    timesteps: Literal["jittered", "grid", "published"] = "jittered"
    steps: int = Field(default=9, ge=1)
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
    buckets: bool = False
    dtype: Dtype = "fp32"


def averaged_estimates(text: str, renoise_steps: int) -> frozenset[int]:
    """Which of ReNoise's estimates e_0 .. e_renoise_steps are averaged.

    Args:
        text: ``all``, ``lastN`` (of fewer than N estimates all) or their numbers, as in ``0,1``.
        renoise_steps: iterations.

    Raises:
        UserError: none of these, or a number that is not there.
    """
    if text == "all":
        return frozenset(range(renoise_steps + 1))
    if text.startswith("last") and text[4:].isdecimal() and int(text[4:]) > 0:
        return frozenset(range(max(0, renoise_steps + 1 - int(text[4:])), renoise_steps + 1))
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) <= renoise_steps for part in parts):
        raise UserError(
            f"--renoise-average {text}: all, lastN (last2), or numbers from 0 to {renoise_steps} (0,1); "
            f"--renoise-steps {renoise_steps} makes {renoise_steps + 1} estimates"
        )
    return frozenset(int(part) for part in parts)
