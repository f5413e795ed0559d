"""The data formats (pairs, scores, shards, manifest) and the conversion of scores to preferences.

The names below are for notebooks (docs/guide/python.md); they are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smpo_common.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from smpo_schemas.inversion_settings import InversionSettings
    from smpo_schemas.manifest import Manifest
    from smpo_schemas.shards.reader import ShardDirectory
    from smpo_schemas.shards.samples import Sample, SampleMeta

__all__ = ["InversionSettings", "Manifest", "Sample", "SampleMeta", "ShardDirectory"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "smpo_schemas.inversion_settings": ["InversionSettings"],
        "smpo_schemas.manifest": ["Manifest"],
        "smpo_schemas.shards.reader": ["ShardDirectory"],
        "smpo_schemas.shards.samples": ["Sample", "SampleMeta"],
    },
)
