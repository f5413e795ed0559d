"""Weigh the pairs of a scores table.

Shape suffixes: P rows of the table, or those that can be weighed; 2 images, D features, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from smpo_common.errors import UserError, one_line
from smpo_models.devices import choose_device
from smpo_pipeline.embeddings.clip import load_clip
from smpo_pipeline.embeddings.extract import Extractor
from smpo_pipeline.embeddings.store import Embeddings, join
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.terminal import counted
from smpo_pipeline.weighing.estimate import SourceFit, fit_sources
from smpo_pipeline.weighing.formula import GOLDEN, effective_size, image_weights, pair_weights
from smpo_pipeline.weighing.options import WeighOptions
from smpo_pipeline.weighing.table import WeighedTable, read_table, require_free, write_column
from smpo_schemas.rejects import write_rejects
from smpo_schemas.scoring.scores import read_scores_info
from smpo_schemas.scoring.weights import (
    WEIGHTS_REJECTS_FILE,
    WEIGHTS_VERSION,
    WeighedSource,
    WeightsInfo,
    write_weights,
)

STAGE = "weigh"


def weigh(options: WeighOptions, console: Console) -> WeightsInfo:
    """Embed the pairs, fit the classifiers, and write the column and the report.

    Args:
        options: the flags.
        console: for what was decided, and progress.

    Raises:
        UserError: an input cannot be used, or no golden pair or no other can be weighed.
    """
    scores = options.scores
    info = read_scores_info(scores)
    reading = options.columns.choices()
    classes = (options.golden, options.golden_column, options.source_column)
    table = read_table(scores, info, options.pairs, reading, *classes)
    require_free(scores, info, options.column, overwrite=options.overwrite)
    device = choose_device(options.embedding.device)
    clip = load_clip(options.features, device)
    folder = options.embedding.embeddings or scores / ".embeddings"
    extractor = Extractor(clip, None, STAGE, device, folder, options.embedding)
    console.print(_choices(table, options, clip.model, device), highlight=False, soft_wrap=True)
    embeddings = extractor(options.pairs, reading)
    rows, rejects = join(table.pair_ids, table.prompts, table.image_ids_P2, embeddings, str(scores), STAGE)
    with console.status("fitting"):
        estimate = _estimate(table, embeddings, rows, options)
    weights = estimate.weight_P[rows >= 0]
    report = WeightsInfo(
        schema_version=WEIGHTS_VERSION,
        column=options.column,
        clip=clip.model,
        fingerprint=clip.fingerprint,
        golden=estimate.golden,
        alpha=estimate.golden / len(weights),
        sources=estimate.sources,
        folds=options.folds,
        seed=options.seed,
        normalised=options.normalise,
        pairs=len(weights),
        rejected=len(rejects),
        mean=float(weights.mean()),
        max=float(weights.max()),
        unnormalised_mean=estimate.mean,
        effective_size=effective_size(weights),
    )
    with locked(scores):
        write_column(scores, read_scores_info(scores), options.column, estimate.weight_P)
        write_rejects(scores / WEIGHTS_REJECTS_FILE, rejects)
        write_weights(scores, report)
    return report


def _choices(table: WeighedTable, options: WeighOptions, clip: str, device: str) -> str:
    """Describe what was decided, in one line."""
    golden = int((table.source_P == GOLDEN).sum())
    named = counted({name: int((table.source_P == number).sum()) for number, name in enumerate(table.sources)})
    how = f"{clip} on {device}, {options.embedding.dtype}; {options.folds} folds; seed {options.seed}"
    return f"{len(table.pair_ids)} pairs, {golden} golden; sources: {one_line(named)}; embeddings by {how}"


@dataclass(frozen=True)
class Estimate:
    """Weights of the table's pairs.

    Attributes:
        weight_P: of each row; NaN where it was not embedded.
        mean: of the weights before they were normalised.
        golden: number of golden pairs.
        sources: by name.
    """

    weight_P: np.ndarray
    mean: float
    golden: int
    sources: dict[str, WeighedSource]


def _estimate(table: WeighedTable, embeddings: Embeddings, row_P: np.ndarray, options: WeighOptions) -> Estimate:
    # In an order of their own, so that the table's order does not affect sums.
    order = np.array(
        sorted(np.flatnonzero(row_P >= 0), key=lambda row: (table.prompts[row], table.pair_ids[row])), dtype=np.int64
    )
    images_P2D = embeddings.image_R2D[row_P[order]]
    texts_P2D = np.repeat(embeddings.text_RD[row_P[order]][:, None], 2, axis=1)
    prompts, source_P = [table.prompts[row] for row in order], table.source_P[order]
    counts = {number: int((source_P == number).sum()) for number in (GOLDEN, *range(len(table.sources)))}
    if missing := [number for number, count in counts.items() if not count]:
        name = "golden pair" if missing[0] == GOLDEN else f"pair of source {table.sources[missing[0]]!r}"
        raise UserError(f"no {name} could be embedded: weights need golden pairs and others of each source")
    x_P2D = np.concatenate([images_P2D, texts_P2D], axis=2)
    fits = fit_sources(x_P2D, prompts, source_P, table.sources, options.folds, options.seed)
    share_S = np.array([counts[number] / len(order) for number in range(len(fits))])
    c_P2S = np.stack([fit.c_P2 for fit in fits], axis=2)
    w_P2 = image_weights(c_P2S, source_P, counts[GOLDEN] / len(order), share_S)
    weight_P = np.full(len(row_P), np.nan)
    weight_P[order] = pair_weights(w_P2, normalise=options.normalise)
    return Estimate(weight_P, float(w_P2.mean()), counts[GOLDEN], _sources(table.sources, fits, counts, share_S))


def _sources(
    names: list[str], fits: list[SourceFit], counts: dict[int, int], share_S: np.ndarray
) -> dict[str, WeighedSource]:
    return {
        name: WeighedSource(
            pairs=counts[number],
            share=float(share_S[number]),
            auc=fit.auc,
            calibration_error=fit.calibration_error,
            l2=fit.l2,
            noise=fit.noise,
        )
        for number, (name, fit) in enumerate(zip(names, fits, strict=True))
    }
