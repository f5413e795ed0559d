"""The convex problem of the reward player.

With r' = r + v . phi and BT(a over b) = -log sigmoid((r'(a) - r'(b)) / tau),

    L = mean over human pairs of [BT by the label + (adversarial / S) sum_{k<S} BT(preferred over sample_k)],

where the samples are the policy's images of the pair's prompt; a tie counts half for either image, and has no
preferred one. Each comparison is a row of a logistic regression without intercept: x = (phi_a - phi_b) / tau, offset
(r_a - r_b) / tau.

Shape suffixes: P human pairs, 2 images, D features, C comparisons: the human pairs', then those with samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smpo_pipeline.calibration.logistic import Rows
from smpo_schemas.labels import TIE


@dataclass(frozen=True)
class Images:
    """Images as the head sees them.

    Attributes:
        phi: features, float [..., D].
        score: by the base reward, float64 [...].
    """

    phi: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Comparisons:
    """All comparisons.

    Attributes:
        rows: the regression.
        weight_C: 1 for human pairs; adversarial over the number of the pair's samples.
        pair_C: number of the human pair that each belongs to.
    """

    rows: Rows
    weight_C: np.ndarray
    pair_C: np.ndarray

    @property
    def is_human(self) -> np.ndarray:
        """Whether each is a human pair's own: bool [C]."""
        return np.arange(len(self.pair_C)) <= self.pair_C.max()

    def weigh(self, mask_C: np.ndarray) -> np.ndarray:
        """Weigh the comparisons that a mask selects, so that the sum over rows is the mean over human pairs, L."""
        weight_C = self.weight_C * mask_C
        return weight_C / weight_C[self.is_human].sum()


def compare(
    human: Images,
    label_P: np.ndarray,
    prompts: Sequence[str],
    samples: Mapping[str, Images],
    tau: float,
    adversarial: float,
) -> Comparisons:
    """List all comparisons.

    Args:
        human: images [P, 2] of the labelled pairs.
        label_P: P(image_0 preferred), without NaN.
        prompts: of each pair.
        samples: images [S] by prompt; a prompt may have none.
        tau: temperature, in units of the score.
        adversarial: weight of the comparisons with samples.
    """
    x = [human.phi[:, 0] - human.phi[:, 1]]
    margin = [human.score[:, 0] - human.score[:, 1]]
    weight, pair = [np.ones(len(label_P))], [np.arange(len(label_P))]
    for number, prompt in enumerate(prompts):
        if prompt in samples and label_P[number] != TIE:
            side, drawn = int(label_P[number] < TIE), samples[prompt]
            count = len(drawn.score)
            x.append(human.phi[number, side] - drawn.phi)
            margin.append(human.score[number, side] - drawn.score)
            weight.append(np.full(count, adversarial / count))
            pair.append(np.full(count, number))
    pair_C = np.concatenate(pair)
    target_C = np.concatenate([label_P, np.ones(len(pair_C) - len(label_P))])
    rows = Rows(np.concatenate(x) / tau, target_C, np.concatenate(margin) / tau, intercept=False)
    return Comparisons(rows, np.concatenate(weight), pair_C)
