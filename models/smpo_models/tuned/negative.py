"""Classifier-free guidance with two models: a negative model predicts for the unconditional prompt (Diffusion-NPO).

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from smpo_common.errors import UserError
from smpo_models.family import Family


def guide_with_negative(
    pipeline: DiffusionPipeline, family: Family, negative: nn.Module, what: str = "the negative model"
) -> None:
    """Make a pipeline guide away from what another denoiser predicts for the unconditional prompt.

    The pipeline's own denoiser predicts for the prompts. Most pipelines then compute
    negative(x, "") + scale (own(x, prompt) - negative(x, "")) (arXiv 2505.11245). Both denoisers are in memory.

    If both have the same weights, the pipeline is not changed.

    Args:
        pipeline: is changed in place.
        family: of the pipeline's model.
        negative: of the same class and architecture, on the pipeline's device and in its dtype.
        what: names the negative model in errors.

    Raises:
        UserError: the pipeline makes no unconditional prediction, or the denoisers differ in their architecture.
    """
    own = getattr(pipeline, family.denoiser_folder)
    require_guidance(family, what)
    require_same_weights(own, negative, what, "the pipeline's denoiser")
    theirs = negative.state_dict()
    if all(torch.equal(value, theirs[name]) for name, value in own.state_dict().items()):
        return
    kind = _DENOISERS[family.guidance_calls]
    setattr(pipeline, family.denoiser_folder, kind(own, negative, lambda: _guides(pipeline)))


def _guides(pipeline: DiffusionPipeline) -> bool | None:
    """Whether the pipeline's current call uses guidance; None if the pipeline does not tell (PixArt-Sigma)."""
    return getattr(pipeline, "do_classifier_free_guidance", None)


def require_guidance(family: Family, what: str) -> None:
    """Check that a family's pipeline makes an unconditional prediction to guide by.

    Args:
        family: of the model.
        what: starts the error.

    Raises:
        UserError: it makes none.
    """
    if family.guidance_calls == "never":
        raise UserError(
            f"{what}: {family.kind} is sampled without an unconditional prediction, so that there is nothing to replace"
        )


def require_same_weights(own: nn.Module, other: nn.Module, what: str, of: str) -> None:
    """Check that two denoisers have weights of the same names and shapes.

    Args:
        own: one of them.
        other: the other.
        what: names ``other`` in the error.
        of: names ``own``.

    Raises:
        UserError: they differ; names the first weight that does.
    """
    shapes = {name: tuple(value.shape) for name, value in own.state_dict().items()}
    others = {name: tuple(value.shape) for name, value in other.state_dict().items()}
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise UserError(
                f"{what} has {name} {others.get(name)}, {of} {shapes.get(name)}: they are not one architecture"
            )


class _Pair(nn.Module):
    """Takes the denoiser's place in a pipeline; attributes that it lacks are those of the positive model."""

    def __init__(self, positive: nn.Module, negative: nn.Module, guides: Callable[[], bool | None]) -> None:
        super().__init__()
        self.positive, self.negative, self._guides = positive, negative, guides

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("positive"), name)


class _UnconditionalFirst(_Pair):
    """For pipelines that ask once for a batch of unconditional rows and, after them, conditional ones."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        latents, guides = next(iter((*args, *kwargs.values()))), self._guides()
        rows = len(latents)
        if guides is None:
            # With guidance, both halves of the batch are the same latents.
            guides = rows % 2 == 0 and torch.equal(latents[: rows // 2], latents[rows // 2 :])
        if not guides:
            return self.positive(*args, **kwargs)
        first, second = self._models()
        outputs = [
            model(*_part(args, rows, half), **_part(kwargs, rows, half)) for model, half in ((first, 0), (second, 1))
        ]
        return _join(*outputs)

    def _models(self) -> tuple[nn.Module, nn.Module]:
        return self.negative, self.positive


class _ConditionalFirst(_UnconditionalFirst):
    """As above, with the conditional rows first."""

    def _models(self) -> tuple[nn.Module, nn.Module]:
        return self.positive, self.negative


class _SeparateCalls(_Pair):
    """For pipelines that call the denoiser twice per timestep, first for the prompts; the second may be left out."""

    _asked: float | None = None
    """Timestep of the last call, if it was for the prompts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        t = float(kwargs["timestep"].flatten()[0])
        unconditional = t == self._asked
        # If this call fails, for example for lack of memory, the pipeline's next run begins with the prompts.
        self._asked = None
        output = (self.negative if unconditional else self.positive)(*args, **kwargs)
        self._asked = None if unconditional else t
        return output


_DENOISERS: Mapping[str, type[_Pair]] = {
    "unconditional first": _UnconditionalFirst,
    "conditional first": _ConditionalFirst,
    "separate": _SeparateCalls,
}
"""By :attr:`smpo_models.family.Family.guidance_calls`."""


def _part(value: Any, rows: int, half: int) -> Any:  # noqa: ANN401
    """Return half of everything that has as many rows as the call."""
    if isinstance(value, Mapping):
        return {name: _part(each, rows, half) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_part(each, rows, half) for each in value)
    has_rows = (torch.is_tensor(value) and value.ndim > 0) or isinstance(value, list)
    if not has_rows or len(value) != rows:
        return value
    return value[: rows // 2] if half == 0 else value[rows // 2 :]


def _join(first: Any, second: Any) -> Any:  # noqa: ANN401
    """Join the rows of two outputs: tuples, or the library's output classes, of a tensor or of a list of tensors."""
    one, other = first[0], second[0]
    rows = one + other if isinstance(one, list) else torch.cat([one, other])
    return (rows,) if isinstance(first, tuple) else type(first)(rows)
