"""Samples of WebDataset shards: one trajectory of one pair, as ``KEY.json`` and ``KEY.safetensors``.

Shape suffixes: K states, 2 images, C h w a latent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from smpo_common.errors import UserError, describe_problem
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.manifest import FLOW, ModelInfo

META, TENSORS = "json", "safetensors"
"""Extensions of a sample's two members."""

REF_NORM = "ref_norm"
"""Name of the tensor that older shards lack."""

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes of stored latents and noise, by their names in the manifest."""

TIMESTEPS = (torch.int64, torch.float32)
"""Dtypes of timesteps: integers, or fractions for flow-matching models."""


class SampleMeta(FrozenModel):
    """``KEY.json``: a trajectory's pair and the trajectory's random choices.

    Attributes:
        pair_id, prompt, label, votes, annotator: as in the pairs.
        trajectory: number of the trajectory within its pair, from 0.
        flipped: both images were mirrored.
        prompt_dropped: inverted, and to be trained, under the empty prompt.
        scores: per reward, the raw scores of image_0 and image_1.
        size: original height and width of both images, in pixels; under ``--size-conditioning constant`` those of the
            crop. A denoiser with size conditioning gets them, in inversion and in training.
        crop: top and left of both images' crops, in pixels of the resized image; 0 under ``constant``.
    """

    pair_id: str
    trajectory: int
    flipped: bool
    prompt: str
    prompt_dropped: bool
    label: float | None
    annotator: str | None
    scores: dict[str, tuple[float, float]]
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]
    votes: int | None = None

    @property
    def used_prompt(self) -> str:
        """The prompt of inversion and training: "" where it was dropped."""
        return "" if self.prompt_dropped else self.prompt


@dataclass(frozen=True)
class Sample:
    """One trajectory.

    Attributes:
        x0_2Chw: float16 or bfloat16, scaled VAE latents of both images, from which the trajectory started, or at which
            the sampler ended.
        noise_K2Chw: same dtype as ``x0``, the noise in each state: (x_t - a_t x0) / s_t.
        timestep_K: int64 (float32 for flow-matching models), increasing.
        ref_error_K2: float32, the reference's error at the stored, rounded state.
        residual_K2: float32, relative distance from the inversion's fixed point; NaN without an inversion step.
        ref_norm_K2: float32, root mean square of the reference's output at the stored state; None in older shards.
    """

    meta: SampleMeta
    x0_2Chw: torch.Tensor
    noise_K2Chw: torch.Tensor
    timestep_K: torch.Tensor
    ref_error_K2: torch.Tensor
    residual_K2: torch.Tensor
    ref_norm_K2: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their stored names."""
        norms = {} if self.ref_norm_K2 is None else {REF_NORM: self.ref_norm_K2}
        return {
            "x0": self.x0_2Chw,
            "noise": self.noise_K2Chw,
            "timestep": self.timestep_K,
            "ref_error": self.ref_error_K2,
            "residual": self.residual_K2,
            **norms,
        }


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Encode a sample's two members, by extension; equal samples give equal bytes."""
    meta = json.dumps(sample.meta.model_dump(), ensure_ascii=False, sort_keys=True, allow_nan=False)
    tensors = {name: tensor.contiguous() for name, tensor in sample.tensors().items()}
    return {META: meta.encode(), TENSORS: safetensors.torch.save(tensors)}


def decode_sample(meta: bytes, tensors: bytes, source: str) -> Sample:
    """Decode a sample from its two members; check names, types, shapes and that all latents are finite.

    Raises:
        UserError: a member is malformed; the message names ``source``.
    """
    try:
        parsed = SampleMeta.model_validate_json(meta)
        loaded = safetensors.torch.load(tensors)
        sample = Sample(
            meta=parsed,
            x0_2Chw=loaded["x0"],
            noise_K2Chw=loaded["noise"],
            timestep_K=loaded["timestep"],
            ref_error_K2=loaded["ref_error"],
            residual_K2=loaded["residual"],
            ref_norm_K2=loaded.get(REF_NORM),
        )
    except ValidationError as error:
        raise UserError(f"{source}: malformed {META} member: {describe_problem(error)}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{source}: malformed {TENSORS} member: {error}") from error
    problem = _tensor_problem(sample)
    if problem:
        raise UserError(f"{source} (pair {parsed.pair_id}): {problem}")
    return sample


def _tensor_problem(sample: Sample) -> str | None:
    tensors = sample.tensors()
    problem = layout_problem({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    if problem:
        return problem
    for name, tensor in tensors.items():
        if name != "residual" and not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    if not (sample.timestep_K.diff() > 0).all():
        return "timesteps do not increase"
    return None


def layout_problem(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str | None:
    """Describe what is wrong with the types and shapes of a sample's tensors (by their stored names), or None."""
    x0_dtype, latent = tensors["x0"]
    count = math.prod(tensors["timestep"][1])
    stored = x0_dtype if x0_dtype in STORAGE.values() else torch.float16
    times = tensors["timestep"][0]
    expected = {
        "x0": (stored, latent),
        "noise": (stored, (count, *latent)),
        "timestep": (times if times in TIMESTEPS else torch.int64, (count,)),
        "ref_error": (torch.float32, (count, 2)),
        "residual": (torch.float32, (count, 2)),
        REF_NORM: (torch.float32, (count, 2)),
    }
    if len(latent) != 4 or latent[0] != 2 or 0 in latent or count == 0:  # noqa: PLR2004  (2 images of C x h x w)
        return f"x0 has shape {latent} and there are {count} states; expected [2, C, h, w] and at least one"
    for name, (dtype, shape) in tensors.items():
        if (dtype, shape) != expected[name]:
            return f"{name} is {dtype} {shape}, expected {expected[name][0]} {expected[name][1]}"
    return None


def timestep_problem(timesteps: Sequence[float], model: ModelInfo) -> str | None:
    """Return an error if the timesteps (at least one) are not strictly increasing in [0, T), else None.

    Only flow-matching models have fractions. A timestep outside would silently index a wrong noise level.
    """
    last = model.num_train_timesteps
    if model.prediction_type != FLOW and not all(isinstance(t, int) for t in timesteps):
        return f"timesteps are not integers, as {model.kind} needs them"
    # Written so that NaN fails, too.
    if not all(later > earlier for earlier, later in pairwise(timesteps)):
        return "timesteps do not increase"
    if not 0 <= timesteps[0] <= timesteps[-1] < last:
        return f"timesteps {timesteps[0]} to {timesteps[-1]} are not within 0 to {last - 1}"
    return None
