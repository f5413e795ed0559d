"""Turn human pairs and samples into the features and base scores that the head is fitted to.

Shape suffixes: P human pairs, 2 images, S samples of a prompt, R rows of embeddings, D features.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from smpo_common.errors import UserError
from smpo_models.draws import named_stream
from smpo_pipeline.calibration.labels import LabelledPairs
from smpo_pipeline.embeddings.store import Embeddings, join
from smpo_pipeline.refreshing.comparisons import Images
from smpo_pipeline.rewards.networks.clip import cosine, products
from smpo_schemas.rejects import Reject

STAGE = "refresh"


def _images(image_ND: np.ndarray, text_ND: np.ndarray, score_N: np.ndarray | None) -> Images:
    """Return features and base scores of images; without ``score_N``, the base score is the CLIP's own cosine."""
    both = torch.from_numpy(image_ND).double(), torch.from_numpy(text_ND).double()
    return Images(products(*both).numpy(), cosine(*both) if score_N is None else score_N)


def human_images(
    data: LabelledPairs, embeddings: Embeddings, scores: str
) -> tuple[Images, list[str], np.ndarray, list[Reject]]:
    """Return the images [P, 2], stripped prompts and labels of the labelled pairs that could be embedded; the others.

    Args:
        data: the scores table.
        embeddings: of the pairs.
        scores: the table's folder.

    Raises:
        UserError: no pair with a decided label could be embedded.
    """
    labelled, ids_P2 = np.flatnonzero(data.labelled).tolist(), data.pairs.images_P2
    row_P, rejects = join(
        [data.pair_ids[row] for row in labelled],
        [data.prompts[row] for row in labelled],
        None if ids_P2 is None else ids_P2[labelled],
        embeddings,
        scores,
        STAGE,
    )
    # In an order of their own, so that the table's order does not affect sums.
    found = [(row, at) for row, at in zip(labelled, row_P, strict=True) if at >= 0]
    found.sort(key=lambda each: (data.prompts[each[0]], data.pair_ids[each[0]], data.labels_P[each[0]]))
    used, row_P = np.array(found, dtype=np.int64).reshape(-1, 2).T
    if not data.decided[used].any():
        first = f"; the first that could not: {rejects[0].reason}" if rejects else ""
        raise UserError(f"--pairs: no decided pair of {scores} could be embedded{first}")
    width = embeddings.image_R2D.shape[2]
    score_P2 = embeddings.score_R2
    flat = _images(
        embeddings.image_R2D[row_P].reshape(-1, width),
        np.repeat(embeddings.text_RD[row_P], 2, axis=0),
        None if score_P2 is None else score_P2[row_P].reshape(-1),
    )
    images = Images(flat.phi.reshape(-1, 2, width), flat.score.reshape(-1, 2))
    prompts = [data.prompts[row].strip() for row in used]  # as `generate` has them
    return images, prompts, data.labels_P[used], rejects


def draw_samples(embeddings: Embeddings, prompts: set[str], most: int, seed: int) -> dict[str, Images]:
    """Draw at most ``most`` of the distinct images of each of some stripped prompts.

    Raises:
        UserError: no prompt has an image.
    """
    places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row, given in enumerate(embeddings.prompts):
        if (prompt := given.strip()) in prompts:
            for side in (0, 1):
                places[prompt].setdefault(embeddings.image_ids_R2[row, side], (row, side))
    if not places:
        raise UserError("--candidates has no image for a prompt of the labelled pairs; generate for the same prompts")
    samples = {}
    for prompt in sorted(places):
        found = [place for _, place in sorted(places[prompt].items())]
        drawn = named_stream(f"{seed}/refresh/{prompt}").permutation(len(found))[:most]
        row_S, side_S = np.array([found[number] for number in sorted(drawn)]).T
        score_R2 = embeddings.score_R2
        score_S = None if score_R2 is None else score_R2[row_S, side_S]
        samples[prompt] = _images(embeddings.image_R2D[row_S, side_S], embeddings.text_RD[row_S], score_S)
    return samples
