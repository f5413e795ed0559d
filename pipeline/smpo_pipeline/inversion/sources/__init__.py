"""Sources of states (``--source``), one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_pipeline.inversion.sources.forward import forward_visits
from smpo_pipeline.inversion.sources.generated import sampled_visits, tracked_visits
from smpo_pipeline.inversion.sources.renoise import renoise_visits
from smpo_pipeline.inversion.sources.truncated import truncated_visits

SOURCES: dict[str, Callable[[Batch], Iterator[Visit]]] = {
    "renoise": renoise_visits,
    "forward": forward_visits,
    "tracked": tracked_visits,
    "sampled": sampled_visits,
    "truncated": truncated_visits,
}
"""By the names that ``--source`` takes."""
