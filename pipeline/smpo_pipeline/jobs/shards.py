"""Open and finish a job that makes shards: rejects, index and manifest are made from its units' records."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    TEXT_FOLDER,
    Manifest,
    ShardEntry,
    Totals,
    autocast_arithmetic,
    read_manifest,
)
from smpo_schemas.rejects import REJECTS_FILE, count_reasons, write_rejects
from smpo_schemas.shards.index import INDEX_FILE, write_index
from smpo_schemas.shards.reader import ShardDirectory


def index_part(run: Run, unit: int) -> AnyPath:
    """Return the file that holds a unit's part of the index until the index of all shards is written."""
    return run.record_path(unit).with_suffix(".parquet")


def open_shards(run: Run, text: Run, *, overwrite: bool) -> Manifest | None:
    """Open a run that makes shards; return the manifest if the run is finished.

    Args:
        run: of the job.
        text: run of the text stage, whose records may be left if the job was killed after writing the manifest.
        overwrite: start over.

    Raises:
        UserError: the folder holds another job's output, or a run with other settings.
    """
    if run.open(overwrite=overwrite, patterns=("shard-*.tar", INDEX_FILE, REJECTS_FILE, f"{TEXT_FOLDER}/")):
        return None
    text.remove()
    return read_manifest(run.out)


def assemble_manifest(
    run: Run,
    records: Sequence[UnitRecord],
    *,
    inversion: InversionSettings,
    **fields: Any,  # noqa: ANN401  (each field's type is the manifest's)
) -> Manifest:
    """Write the rejects and the index, and return the manifest, which the caller writes last.

    Args:
        run: of the job.
        records: of all units, in order.
        inversion: settings of the states.
        fields: further fields of the manifest that no unit tells.

    Raises:
        UserError: every pair was rejected.
    """
    rejects = [reject for record in records for reject in record.rejects]
    write_rejects(run.out / REJECTS_FILE, rejects)
    shards = [ShardEntry.model_validate(record.entry) for record in records if record.entry]
    if not shards:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise UserError(f"no pair is left, {len(rejects)} were rejected (see {run.out / REJECTS_FILE}){first}")
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        inversion=inversion,
        ref_error_arithmetic=autocast_arithmetic(inversion.dtype),
        has_ref_norm=True,
        shards=shards,
        totals=Totals(
            pairs_in=sum(record.pairs_in for record in records),
            pairs=sum(record.pairs for record in records),
            samples=sum(shard.samples for shard in shards),
            states=sum(shard.states for shard in shards),
            rejected=len(rejects),
            bytes=sum(shard.bytes for shard in shards),
            prompts_cut=sum(record.prompts_cut for record in records),
        ),
        rejected_reasons=count_reasons(rejects),
        versions={name: version(name) for name in ("smpo-diffusion", "torch", "diffusers", "transformers", "numpy")},
        **fields,
    )
    parts = [index_part(run, record.unit) for record in records if record.entry]
    return manifest.model_copy(update={"index": write_index(ShardDirectory(run.out, manifest), parts)})
