"""Sample images with a model's own pipeline, from initial noise that the caller draws."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.family_bases.packing import unpacked
from smpo_models.noise_schedules.samplers import first_order_scheduler
from smpo_models.weights import load_part, load_weights
from smpo_schemas.choices import SamplerChoice

_OWN_NOISE = "DPMSolverSDEScheduler"
"""A scheduler that does not take one generator per image."""


def load_pipeline(
    model: str,
    what: str,
    parts: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    variant: str | None,
    kind: type[DiffusionPipeline] = DiffusionPipeline,
    sampler: SamplerChoice = "model",
) -> DiffusionPipeline:
    """Load a model's pipeline without safety checker, on the CPU.

    Args:
        model: hub id or folder.
        what: names the model in errors.
        parts: parts that are loaded already, such as a denoiser in training, by their names in the pipeline.
        dtype: of the other parts.
        variant: of the files of weights; None: those without one, or the only one there.
        kind: class of the pipeline; by default the one that the model names.
        sampler: ``model`` for the pipeline's own scheduler, ``ddim`` for the first-order one.

    Raises:
        UserError: it cannot be loaded; a part lacks weights, which diffusers would draw at random; or its own scheduler
            draws noise that would depend on the batch.
    """
    index = load_part(kind.load_config, model, what)
    if sampler == "model" and _OWN_NOISE in index.get("scheduler", ()):
        raise UserError(f"{what}: its {_OWN_NOISE} draws one noise for a whole batch; give --sampler ddim")
    loaded = dict(parts)
    if "safety_checker" in index:
        loaded |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for name, (library, class_name) in ((name, of) for name, of in index.items() if isinstance(of, (list, tuple))):
        if name in loaded:
            continue
        loader = _class_with_weights(str(library), str(class_name))
        if class_name is None:
            loaded[name] = None  # such as SD3's third text encoder: diffusers wants to be told that it is not there
        elif loader:
            loaded[name] = load_weights(
                loader.from_pretrained, model, what, variant=variant, subfolder=name, dtype=dtype
            )
    pipeline = load_part(kind.from_pretrained, model, what, dtype=dtype, **loaded)
    if sampler == "ddim":
        pipeline.scheduler = first_order_scheduler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: DiffusionPipeline,
    family: Family,
    prompts: Sequence[str],
    noise_BChw: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float | None,
    generators: Sequence[torch.Generator] | None = None,
    output_type: str = "pil",
    watch: Callable[[int, torch.Tensor], None] | None = None,
) -> Any:  # noqa: ANN401  (PIL images or a tensor)
    """Sample one image per prompt from its initial noise, on the noise's device and in its dtype.

    Args:
        pipeline: from :func:`load_pipeline`.
        family: of the model; its weights need not be loaded.
        prompts: B of them.
        noise_BChw: standard normal noise of the latents' shape.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, 1 is none; or the input of FLUX.1-dev; None for models without.
        generators: one per image, for what a stochastic sampler draws; None: torch's global one.
        output_type: ``pil``, or ``latent`` for normalised latents [B, C, h, w].
        watch: called after each step with its number, from 0, and the normalised latents [B, C, h, w] that it gave.
    """
    height, width = noise_BChw.shape[2:]
    with _watched(pipeline.scheduler, watch, height, width):
        made = pipeline(
            prompt=list(prompts),
            height=height * family.latent_factor,
            width=width * family.latent_factor,
            latents=family.to_pipeline(noise_BChw),
            num_inference_steps=steps,
            generator=None if generators is None else list(generators),
            output_type=output_type,
            **family.sampling_options(guidance_scale, len(prompts)),
        ).images
    return family.from_pipeline(made, height, width, pipeline.vae) if output_type == "latent" else made


@contextmanager
def _watched(
    scheduler: Any,  # noqa: ANN401  (diffusers has no types)
    watch: Callable[[int, torch.Tensor], None] | None,
    height: int,
    width: int,
) -> Iterator[None]:
    """Call ``watch`` after each of the scheduler's steps within the block."""
    if watch is None:
        yield
        return
    # Not by the pipeline's own callback, which differs between pipelines.
    inner, numbers = scheduler.step, count()

    @functools.wraps(inner)  # pipelines read the signature
    def step(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        result = inner(*arguments, **options)
        watch(next(numbers), _unpacked(result[0], height, width))
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _unpacked(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert latents, in whatever form the pipeline denoises them, to [B, C, h, w]."""
    if latents.ndim == 4:  # noqa: PLR2004  (B, C, h, w)
        return latents
    if latents.shape[1] == height * width:
        return latents.transpose(1, 2).unflatten(2, (height, width))
    return unpacked(latents, height, width)


def sampling_in_words(sampler: str, steps: int, guidance_scale: float | None) -> str:
    """Say how images were sampled; an empty ``sampler`` stands for images made elsewhere."""
    if not sampler:
        return "images made elsewhere"
    guidance = "no guidance scale" if guidance_scale is None else f"guidance scale {guidance_scale:g}"
    return f"{steps} {sampler} steps, {guidance}"


def _class_with_weights(library: str, name: str) -> Any:  # noqa: ANN401  (of either library)
    """Return the class that a pipeline's index names for a part; None for parts without weights, such as tokenizers."""
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    return found if inspect.isclass(found) and issubclass(found, torch.nn.Module) else None
