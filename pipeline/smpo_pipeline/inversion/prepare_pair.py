"""Prepare a pair for the inverter from decoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from smpo_pipeline.images.buckets import Size, resize_pair
from smpo_pipeline.inversion.batch import PreparedPair


def prepare_pair(
    prompt: str,
    images: Sequence[Image.Image],
    sizes: Sequence[Size],
    *,
    pair_id: str = "pair",
    label: float | None = None,
    votes: int | None = None,
    annotator: str | None = None,
    scores: Mapping[str, tuple[float, float]] | None = None,
    measured: bool = False,
) -> PreparedPair:
    """Bring both images of a pair to one size, as ``smpo-pipeline invert`` does.

    Args:
        prompt: what both images were made for.
        images: image_0 and image_1, upright RGB of any size.
        sizes: (height, width) in pixels to choose from; the one nearest to the pair's aspect ratio is used.
        pair_id: with the seed, the source of the pair's randomness.
        label: P(image_0 preferred) as people gave it.
        votes: how many people the label stands for.
        annotator: who labelled it.
        scores: of both images by reward.
        measured: whether the noise ratio is measured at its states.

    Raises:
        ImageRejectedError: the images differ too much in shape to share one size.
    """
    pixels, crops = resize_pair(images, sizes)
    return PreparedPair(
        pair_id=pair_id,
        prompt=prompt,
        label=label,
        votes=votes,
        annotator=annotator,
        scores=dict(scores or {}),
        pixels_2HW3=np.stack(pixels),
        size=((images[0].height, images[0].width), (images[1].height, images[1].width)),
        crop=(crops[0], crops[1]),
        measured=measured,
    )
