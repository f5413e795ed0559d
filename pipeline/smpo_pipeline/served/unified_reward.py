"""The questions that UnifiedReward 2.0 (arXiv 2503.05236) was trained on, and its answers.

The texts are those of its authors' repository (CodeGoat24/UnifiedReward, MIT licence). Other vision models understand
them, too.
"""

from __future__ import annotations

import re

AXES = ("alignment", "coherence", "style")

_RATE = """\
You are presented with a generated image and its associated text caption. \
Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""

_COMPARE = """\
You are presented with two generated images (Image 1 and Image 2) along with a shared text caption. \
Your task is to comparatively evaluate the two images across three specific dimensions:

- Alignment Score: How well each image matches the caption in terms of content.
- Coherence Score: How logically consistent and visually coherent each image is \
(absence of visual glitches, distorted objects, etc.).
- Style Score: How aesthetically appealing each image is, regardless of caption accuracy.

For each dimension, you must assign a relative score to Image 1 and Image 2, such that:
- Each score is a float between 0 and 1 (inclusive).
- The scores for Image 1 and Image 2 must sum to exactly 1.0 for each dimension.
- The higher the score, the better that image is in the corresponding dimension *relative to the other*.

This format emphasizes comparative quality rather than absolute evaluation.

Please provide your evaluation in the format below:

Alignment Score:
 Image 1: X
 Image 2: Y

Coherence Score:
 Image 1: X
 Image 2: Y

Style Score:
 Image 1: X
 Image 2: Y

Your task is provided as follows:
Text Caption: [{prompt}]"""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_RATING = re.compile(rf"(\w+) score\s*(?:\(1-5\))?\s*:\s*{_NUMBER}")
_SHARES = re.compile(rf"(\w+) score\s*:\s*image 1\s*:\s*{_NUMBER}\s*image 2\s*:\s*{_NUMBER}")
_SUM_TOLERANCE = 0.02
"""How far two shares may be from summing to 1: models round."""


class UnreadableAnswerError(RuntimeError):
    """An answer does not have the form that was asked for."""


def rating_question(prompt: str) -> str:
    """Ask for ratings of one image; the text follows the image."""
    return _RATE.replace("{prompt}", prompt)


def comparison_question(prompt: str) -> str:
    """Ask for a comparison of two images; the text follows the images."""
    return _COMPARE.replace("{prompt}", prompt)


def read_ratings(answer: str) -> dict[str, float]:
    """Read a rating from 1 to 5 for each of :data:`AXES`; if there are several, the last counts.

    Raises:
        UnreadableAnswerError: a rating is missing, or out of range.
    """
    ratings = {axis: float(number) for axis, number in _RATING.findall(_plain(answer))}
    for axis in AXES:
        if not 1 <= ratings.get(axis, 0) <= 5:  # noqa: PLR2004  (the scale that was asked for)
            raise UnreadableAnswerError(f"no {axis} score from 1 to 5 in {answer!r:.100}")
    return {axis: ratings[axis] for axis in AXES}


def read_comparison(answer: str) -> dict[str, float]:
    """Read the first image's share, from 0 to 1, for each of :data:`AXES`; if there are several, the last counts.

    Raises:
        UnreadableAnswerError: a share is missing or out of range, or two do not sum to 1.
    """
    pairs = {axis: (float(first), float(second)) for axis, first, second in _SHARES.findall(_plain(answer))}
    for axis in AXES:
        first, second = pairs.get(axis, (-1.0, -1.0))
        if min(first, second) < 0 or abs(first + second - 1) > _SUM_TOLERANCE:
            raise UnreadableAnswerError(f"no two {axis} scores that sum to 1 in {answer!r:.100}")
    return {axis: pairs[axis][0] / sum(pairs[axis]) for axis in AXES}


def _plain(answer: str) -> str:
    """Drop capitals and the asterisks of bold text, which some models add."""
    return answer.replace("*", "").lower()
