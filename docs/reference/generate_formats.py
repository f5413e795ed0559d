"""Write ``formats.md``, the reference of all files, from the classes and schemas that write and read them.

Run ``python docs/reference/generate_formats.py`` after a change of a file format; with ``--check`` it fails if the page
is old.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
from described_fields import described_fields, descriptions
from generated_page import table, write_or_check

from smpo_pipeline.rounds.record import ROUNDS_VERSION, RoundsRecord
from smpo_schemas.generation.candidates import CANDIDATES_SCHEMA, CANDIDATES_VERSION, Candidates
from smpo_schemas.generation.selection import SELECTED_SCHEMA, SELECTION_VERSION, SelectionInfo
from smpo_schemas.manifest import MANIFEST_VERSION, Manifest
from smpo_schemas.pairs.columns import PICK_A_PIC, PairColumns
from smpo_schemas.pairs.normalising import Pair
from smpo_schemas.rejects import REJECT_SCHEMA, Reject
from smpo_schemas.scoring.calibration import CALIBRATION_VERSION, Calibration
from smpo_schemas.scoring.refresh import REFRESH_VERSION, RefreshInfo
from smpo_schemas.scoring.scores import SCORES_VERSION, ScoresInfo, score_schema
from smpo_schemas.scoring.weights import WEIGHTS_VERSION, WeightsInfo
from smpo_schemas.shards.index import INDEX_SCHEMA
from smpo_schemas.shards.samples import Sample, SampleMeta
from smpo_trainer.monitoring.bands import BANDED, banded_name, bands
from smpo_trainer.monitoring.metric_names import METRICS
from smpo_trainer.output.file_list import CHECKPOINT_FILES, RUN_FILES
from smpo_trainer.output.run_folder import TRAINING_VERSION
from smpo_trainer.output.training_record import TrainingRecord

PAGE = Path(__file__).with_name("formats.md")

_HEAD = """# File formats

Made by `python docs/reference/generate_formats.py` from the classes that write and read these files. Do not edit by
hand.

Every stage writes its marker last (`candidates.json`, `scores.json`, `manifest.json`, `training.json`): a folder
without it is an unfinished run, which the same command continues. Files name their `schema_version`; another version is
refused.
"""

_CANDIDATES = {
    "pair_id": "hash of the prompt, the row's number among its own, and all that decides the images: model, sampler, "
    "steps, guidance, seed, ...",
    "prompt": "without blanks at its ends",
    "image_0": "file of the image",
    "image_1": "file of the image",
    "label": "null",
    "noise_0": "of the initial noise: its seed, the number of the image among those of its prompt, and C, h, w",
    "noise_1": "of the other image's noise",
    "latents_0": "file of image_0's latents, below; null without `--keep`",
    "latents_1": "file of image_1's latents",
    "model": "fingerprint of the denoiser in float32",
}

_KEPT = [
    ("`ID`", "float32 [C, h, w]", "what the VAE decoded, normalised"),
    ("`ID.states`", "float32 [M, C, h, w]", "inputs of M steps of the sampler, normalised (`--keep states:M`)"),
    ("`ID.timesteps`", "float32 [M]", "their timesteps, decreasing"),
]

_SCORES = {
    "pair_id": "as in the pairs, or made from prompt and images",
    "prompt": "as in the pairs",
    "label": "as in the pairs",
    "votes": "as in the pairs",
    "annotator": "as in the pairs",
    "image_0_id": "hash of the image file's content",
    "image_1_id": "hash of the image file's content",
    "NAME_0": "raw score of image_0 by the reward NAME; two columns per reward",
    "NAME_1": "raw score of image_1",
}

_SELECTED = {
    "pair_id": "hash of the prompt and of both images' hashes, in either order",
    "prompt": "as in the candidates",
    "image_0": "encoded image file; a hash decides which of the two it is",
    "image_1": "the other image",
    "label": "null; with `--label` 1 if image_0 was chosen, else 0",
    "annotator": "`select:` and the name of the method",
    "chosen_image": "which image was chosen: 0 or 1",
    "gap": "by how much the chosen image is better, from -1 to 1: difference of the mean win rates; for `ranking` "
    "2 P(chosen over rejected) - 1",
}

_INDEX = {
    "shard": "number of the tar in the manifest's list, from 0",
    "key": "of the sample",
    "meta_offset": "byte at which `KEY.json` starts in the tar",
    "meta_bytes": "its length",
    "tensors_offset": "byte at which `KEY.safetensors` starts in the tar",
    "tensors_bytes": "its length",
    "meta": "content of `KEY.json`",
    "timesteps": "of the trajectory's K states, increasing",
    "latent": "shape C, h, w of its latents",
}


_TEXT = [
    ("`text-NNNNNN`", "`key`", "[N] int64", "first 8 bytes of the SHA-256 of the prompt, little-endian"),
    ("`text-NNNNNN`", "`text`", "[N, L, D]", "embeddings that the denoiser attends to, padding included; or"),
    ("`text-NNNNNN`", "`text`", "[sum of L, D]", "those of the prompts one after the other, without padding"),
    ("`text-NNNNNN`", "`text_end`", "int64 [N]", "where each prompt's embeddings end, without padding only"),
    ("`text-NNNNNN`", "`pooled`", "[N, D]", "pooled embedding (not for Stable Diffusion 1 and 2)"),
    ("`index`", "`key`", "[P] int64", "as above, increasing"),
    ("`index`", "`file`", "[P] int32", "number of the file that holds the prompt"),
    ("`index`", "`row`", "[P] int32", "its row there"),
    ("`index`", "`cut`", "[P] bool", "whether the text encoders truncate the prompt"),
]


def main() -> None:
    """Write the page, or compare it with what would be written."""
    write_or_check(PAGE, _page())


def _page() -> Iterator[str]:
    seen: set[type] = set()
    yield _HEAD
    yield from _pairs()
    yield "## Candidates (output of `generate`)\n"
    yield "`candidates-NNNNNN.parquet` are pairs, two images of a prompt per row; further columns are the prompts'.\n"
    yield from _columns(CANDIDATES_SCHEMA, _CANDIDATES)
    yield "### latents-NNNNNN.safetensors\n"
    yield "With `--keep`: ID is the hash of the image file's content, as in the scores.\n"
    yield from table(("tensor", "shape", "meaning"), _KEPT)
    yield "### candidates.json\n"
    yield from _models(Candidates, CANDIDATES_VERSION, seen)
    yield "## Scores (output of `score`)\n"
    yield "### scores.json\n"
    yield from _models(ScoresInfo, SCORES_VERSION, seen)
    yield "### Parquet files\n"
    yield "One row per pair, in input order. `scores.json` lists the files.\n"
    yield from _columns(score_schema(["NAME"]), _SCORES)
    yield "## Selection (output of `select`)\n"
    yield "### pairs.parquet\n"
    yield "One row per selected pair, prompt by prompt; further columns are the candidates'. `scores/` holds the scores"
    yield "of these pairs, then those of all candidates, as an output of `score`.\n"
    yield from _columns(SELECTED_SCHEMA, _SELECTED)
    yield "### selection.json\n"
    yield from _models(SelectionInfo, SELECTION_VERSION, seen)
    yield "## rejected.parquet (output of `generate`, `score`, `select` and `invert`)\n"
    yield "Pairs, or prompts of `generate` and `select`, that are in no result: in = out + rejected.\n"
    yield from _columns(REJECT_SCHEMA, descriptions(Reject))
    yield "## Shards (output of `invert`)\n"
    yield "`shard-NNNNNN.tar` are WebDataset tars. A sample is one trajectory of one pair; KEY is a running number.\n"
    yield "### KEY.json\n"
    yield from _fields(SampleMeta)
    yield "### KEY.safetensors\n"
    yield "K states, 2 images (image_0, image_1), C x h x w a latent.\n"
    yield from _tensors()
    yield "### index.parquet\n"
    yield "One row per trajectory, so that a trainer does not read the tars. It can be made again from them.\n"
    yield from _columns(INDEX_SCHEMA, _INDEX)
    yield "### text/\n"
    yield "With `--text stored`: `text-NNNNNN.safetensors`, N prompts each, and `index.safetensors`, of all P.\n"
    yield from table(("file", "tensor", "shape", "meaning"), _TEXT)
    yield "### manifest.json\n"
    yield from _models(Manifest, MANIFEST_VERSION, seen)
    yield from _fitted(seen)
    yield from _training(seen)


def _pairs() -> Iterator[str]:
    yield "## Pairs (input)\n"
    yield "Parquet, JSON, JSONL or WebDataset, one row per pair. [Layouts](layouts.md) of known data sets are"
    yield "recognised; flags name other columns.\n"
    meaning = descriptions(Pair)
    defaults = PairColumns(label="label", votes="votes", pair_id="pair_id", annotator="annotator")
    rows = [
        (
            f"`{name}`" if (name := getattr(defaults, field.name)) else "",
            f"`{name}`" if (name := getattr(PICK_A_PIC, field.name)) else "",
            f"`--{field.name.replace('_', '-')}-column`",
            meaning.get(field.name) or _CHOSEN[field.name],
        )
        for field in fields(PairColumns)
    ]
    yield from table(("column", "Pick-a-Pic", "flag", "content"), rows)
    yield "An image is the bytes of its file, a struct of `bytes` and `path`, or a path relative to the pairs file.\n"


_CHOSEN = {
    "chosen": "the preferred image; instead of `image_0`, `image_1` and `label`",
    "rejected": "the other image",
}


def _models(kind: type, version: int, seen: set[type]) -> Iterator[str]:
    """A model's fields, and those of the models in it that are not yet in ``seen``."""
    yield f"`schema_version` is {version}.\n"
    yield from _fields(kind)
    waiting = [kind]
    while waiting:
        for field in described_fields(waiting.pop(0)):
            if field.model and field.model not in seen:
                seen.add(field.model)
                waiting.append(field.model)
                yield f"#### {field.model.__name__}\n"
                yield from _fields(field.model)


def _fields(kind: type) -> list[str]:
    return table(
        ("field", "type", "meaning"), ((f"`{each.name}`", each.type, each.meaning) for each in described_fields(kind))
    )


def _columns(schema: pa.Schema, meaning: Mapping[str, str]) -> list[str]:
    if missing := sorted(set(schema.names) ^ set(meaning)):
        raise SystemExit(f"columns without a description, or the other way round: {', '.join(missing)}")
    return table(
        ("column", "type", "meaning"), ((f"`{each.name}`", str(each.type), meaning[each.name]) for each in schema)
    )


def _tensors() -> list[str]:
    rows = []
    for attribute, meaning in descriptions(Sample).items():
        name, _, shape = attribute.rpartition("_")
        rows.append((f"`{name}`", f"[{', '.join(shape)}]", meaning))
    return table(("tensor", "shape", "meaning"), rows)


def _fitted(seen: set[type]) -> Iterator[str]:
    yield "## calibration.json (output of `calibrate`)\n"
    yield from _models(Calibration, CALIBRATION_VERSION, seen)
    yield "## weights.json (output of `weigh`)\n"
    yield "Beside it `weights-rejected.parquet`, as `rejected.parquet`: pairs without a weight.\n"
    yield from _models(WeightsInfo, WEIGHTS_VERSION, seen)
    yield "## refresh.json (output of `refresh`)\n"
    yield "Beside it `head.safetensors` and `rejected.parquet`.\n"
    yield from _models(RefreshInfo, REFRESH_VERSION, seen)


def _training(seen: set[type]) -> Iterator[str]:
    yield "## Training run (output of `smpo-train`)\n"
    yield from table(("file", "content"), ((f"`{name}`", text) for name, text in RUN_FILES.items()))
    yield "### checkpoint-NNNNNN/\n"
    yield from table(("file", "content"), ((f"`{name}`", text) for name, text in CHECKPOINT_FILES.items()))
    yield "### config.yaml\n"
    yield "A key per flag of [smpo-train](cli.md#smpo-train), with underscores for dashes. `score`, `invert` and"
    yield "`evaluate` write theirs in the same form.\n"
    yield "### training.json\n"
    yield from _models(TrainingRecord, TRAINING_VERSION, seen)
    yield "### metrics.jsonl\n"
    yield "Means over all states of the step; null where no state has such a value.\n"
    yield from table(("metric", "meaning"), ((f"`{name}`", text) for name, text in METRICS.items()))
    example = banded_name(BANDED[0], bands(1000)[0])
    yield f"By band of timesteps, for example `{example}`: {', '.join(f'`{name}`' for name in BANDED)}. On held-out"
    yield "pairs (`--val-fraction`), every metric of states with `val/` before its name.\n"
    yield "## Rounds (output of `rounds`)\n"
    yield "The folders of a round are outputs of the commands above.\n"
    yield "### rounds.json\n"
    yield from _models(RoundsRecord, ROUNDS_VERSION, seen)


if __name__ == "__main__":
    main()
