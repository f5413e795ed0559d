"""The flags of commands that embed images. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options
from smpo_pipeline.options import FOLDER, Device, LocalPath, MaxRejectRate
from smpo_schemas.choices import Dtype

_CLIPS = ("clipscore", "pickscore")


def _known_clip(spec: str | None) -> str | None:
    from smpo_models.hub import require_source  # noqa: PLC0415  (keeps --help quick)

    name, equals, model = (spec or _CLIPS[0]).partition("=")
    if name not in _CLIPS or (equals and not model):
        raise UserError(f"--features {spec}: expected {' or '.join(f'{each}[=MODEL]' for each in _CLIPS)}")
    if model:
        require_source(model, f"--features {spec}")
    return spec


Features = Annotated[
    str,
    AfterValidator(_known_clip),
    Flag(metavar="NAME[=MODEL]", place="named"),
    Field(
        description="CLIP whose embeddings are the features: clipscore or pickscore, with =MODEL for your own weights."
    ),
]


class EmbeddingOptions(Options):
    """How images and prompts are embedded."""

    model_config = ConfigDict(title="Embeddings")

    embeddings: Annotated[LocalPath | None, FOLDER] = None
    """Folder that keeps the embeddings, so that a killed run continues and the next one starts with them; default:
    .embeddings in the folder of --scores."""
    device: Device = None
    dtype: Dtype = "fp32"
    """Dtype of the CLIP's matrix products."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per model call."""
    max_reject_rate: MaxRejectRate = 0.05
