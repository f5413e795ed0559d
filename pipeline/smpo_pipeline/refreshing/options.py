"""The flags of ``smpo-pipeline refresh``. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.embeddings.options import EmbeddingOptions, Features
from smpo_pipeline.options import FOLDER, ColumnOptions, LabelsFile, LocalPath, OneReward, Out, Pairs, PathOrPattern


class RefreshOptions(Options):
    """The flags of ``refresh``."""

    reward: OneReward
    scores: Annotated[LocalPath, FOLDER]
    """Output directory of `smpo-pipeline score` for pairs that people labelled; its labels are used."""
    pairs: Pairs
    candidates: Annotated[
        tuple[PathOrPattern, ...],
        Flag(typed=list[str], metavar="PATH|URL", place=True),
        Field(description="Samples of the policy for the same prompts: output of `smpo-pipeline generate`."),
    ]
    out: Out
    features: Features | None = None
    """CLIP of the head: clipscore or pickscore, with =MODEL for your own weights. Default: the reward's own, if it is
    one of them."""
    adversarial: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the comparisons with samples; published with 0.1."""
    samples: Annotated[int, Field(ge=1)] = 4
    """Maximum number of samples per prompt; published with 4."""
    tau: Annotated[float | None, Field(gt=0)] = None
    """Temperature of the reward, in its unit. Default: fitted to the labels."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds, split by prompt, that choose the penalty and measure the result."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split into folds and of the draw of samples."""
    allow_worse: bool = False
    """Write the reward even if its agreement with held-out labels falls by more than one percentage point."""
    labels: LabelsFile = None
    columns: ColumnOptions = ColumnOptions()
    embedding: EmbeddingOptions = EmbeddingOptions()
    overwrite: Overwrite = False
    """Replace another refreshed reward in --out."""
