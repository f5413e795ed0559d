"""Flags that several commands of ``smpo-pipeline`` share, and groups of them. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationInfo, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, flag_name
from smpo_common.store_path import AnyPath, parse_path
from smpo_schemas.dtypes import Dtype

# Validators; each names the flag in a UserError


def _flag(info: ValidationInfo, value: object) -> str:
    """``--flag value``."""
    return f"{flag_name(str(info.field_name))} {value}"


def _path(given: Any) -> AnyPath:  # noqa: ANN401  (a path, or what a user typed)
    return parse_path(given) if isinstance(given, str) else given


def _local_path(given: Any) -> Path:  # noqa: ANN401  (a path, or what a user typed)
    path = _path(given)
    if not isinstance(path, Path):
        raise UserError(f"{path} is a URL; this command takes paths of this machine: copy it here first")
    return path


def _existing(path: AnyPath, info: ValidationInfo) -> AnyPath:
    """Refuse a path where nothing is; URLs are asked for later."""
    if isinstance(path, Path) and not path.exists():
        raise UserError(f"{_flag(info, path)} does not exist")
    return path.absolute()


def _writable(path: AnyPath, info: ValidationInfo) -> AnyPath:
    """Refuse a folder that cannot be made, since something else is there, or above it."""
    if isinstance(path, Path):
        _refuse_no_folder(path, (path, *path.parents), info)
    return path.absolute()


def _writable_file(path: Path, info: ValidationInfo) -> Path:
    """Refuse a file that cannot be written, since a folder is there, or no folder above it."""
    if path.is_dir():
        raise UserError(f"{_flag(info, path)} is a folder; name a file")
    _refuse_no_folder(path, path.parents, info)
    return path


def _refuse_no_folder(path: Path, folders: Sequence[Path], info: ValidationInfo) -> None:
    wrong = next((each for each in folders if each.exists() and not each.is_dir()), None)
    if wrong:
        raise UserError(f"{flag_name(str(info.field_name))}: cannot write {path}: {wrong} is no folder")


def _model_source(model: str, info: ValidationInfo) -> str:
    from smpo_models.hub import require_source  # noqa: PLC0415  (keeps --help quick)

    require_source(model, _flag(info, model))
    return absolute_model(model)


def absolute_model(model: str) -> str:
    """A hub id as it is, a folder with its absolute path."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def _known_rewards(specs: tuple[str, ...]) -> tuple[str, ...]:
    from smpo_pipeline.rewards import check_reward  # noqa: PLC0415  (keeps --help quick)

    return tuple(check_reward(spec) for spec in specs)


def _known_device(device: str | None) -> str | None:
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: cpu or cuda")
    return device


def _batch_size(given: Any) -> int | None:  # noqa: ANN401  (a number, or what a user typed)
    if given in (None, "auto"):
        return None
    if str(given).isdecimal() and int(given) > 0:
        return int(given)
    raise UserError(f"--batch-size {given}: a number from 1, or auto")


# Flags

FILE = Flag(typed=str, metavar="FILE", place=True)
FOLDER = Flag(typed=str, metavar="DIR", place=True)
FOLDER_OR_URL = Flag(typed=str, metavar="DIR|URL", place=True)

_AsText = PlainSerializer(str)
ExistingPathOrUrl = Annotated[AnyPath, PlainValidator(_path), AfterValidator(_existing), _AsText]
ExistingPath = Annotated[Path, AfterValidator(_existing)]
LocalPath = Annotated[Path, PlainValidator(_local_path)]
OutFile = Annotated[LocalPath, AfterValidator(_writable_file)]
ModelSource = Annotated[str, AfterValidator(_model_source)]

Pairs = Annotated[
    tuple[ExistingPathOrUrl, ...],
    Flag(typed=list[str], metavar="PATH|URL", place=True),
    Field(
        description="Parquet or JSONL files, or folders of them (links are followed, hidden names left out), one row a "
        "pair. Pick-a-Pic v2's columns are known; others are named by flags (--image-0-column, --chosen-column, ...)."
    ),
]
Out = Annotated[
    LocalPath,
    AfterValidator(_writable),
    FOLDER,
    Field(description="Output directory; made where it is missing."),
]
OutOrUrl = Annotated[
    AnyPath,
    PlainValidator(_path),
    AfterValidator(_writable),
    _AsText,
    FOLDER_OR_URL,
    Field(description="Output directory; made where it is missing. URLs: docs/guide/storage.md."),
]
Rewards = Annotated[
    tuple[str, ...],
    AfterValidator(_known_rewards),
    Flag(metavar="NAME[=MODEL]", place="named"),
    Field(
        description="NAME, NAME=MODEL (hub id, folder or file) or your own MODULE:CLASS, repeatable, for example "
        "pickscore or pickscore=./my-pickscore. Which there are and what each says: docs/guide/scoring.md."
    ),
]
Variant = Annotated[
    str | None,
    Field(
        description="Variant of the model's files of weights, for example fp16. Default: those without one, or the "
        "only one that is there."
    ),
]
Device = Annotated[
    str | None,
    AfterValidator(_known_device),
    Field(description="cpu or cuda; default: cuda where this machine (with --ray-address: the cluster) has a GPU."),
]
ModelDtype = Annotated[
    Dtype | None,
    Field(description="Number type of the diffusion model; default: bf16 on GPUs that have it, else fp32."),
]
AutoBatchSize = Annotated[
    int | None,
    PlainValidator(_batch_size),
    PlainSerializer(lambda size: str(size or "auto")),
    Flag(typed=str),
    Field(
        description="Trajectories per model call, or auto: the largest that fits on the GPU; on a CPU the smallest "
        "whose doubling gains less than 5 %."
    ),
]
RayAddress = Annotated[str | None, Field(description="Ray cluster to run on; default: one of its own.")]
Limit = Annotated[int | None, Field(ge=1, description="Only the first N pairs.")]
MaxRejectRate = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Stop when more of the pairs are rejected than this (of the first 200, or of all so far).",
    ),
]
Overwrite = Annotated[
    bool,
    Flag(recorded=False),
    Field(description="Start over. Without it an unfinished run is continued and a finished one left alone."),
]


class ColumnOptions(Options):
    """Which columns of the input are what."""

    model_config = ConfigDict(title="Input columns (where they are not Pick-a-Pic's or the normalised names)")

    prompt_column: str | None = None
    """Text of the prompt."""
    image_0_column: str | None = None
    """First image: file bytes, or a path relative to the input file."""
    image_1_column: str | None = None
    """Second image."""
    label_column: str | None = None
    """P(image_0 preferred): 1, 0, or 0.5 for a tie."""
    pair_id_column: str | None = None
    """Stable name of the pair; without one (null, NaN and blank are none), a hash of prompt and images."""
    annotator_column: str | None = None
    """Who labelled the pair."""
    chosen_column: str | None = None
    """The preferred image, of data sets that have chosen and rejected images instead of a label. Which of the two
    becomes image_0 is drawn from the pair's content."""
    rejected_column: str | None = None
    """The other image; with --chosen-column."""

    @model_validator(mode="after")
    def _refuse_two_layouts(self) -> Self:
        given = {name: column for name, column in self if column is not None}
        if "chosen_column" not in given and "rejected_column" not in given:
            return self
        for name in ("chosen_column", "rejected_column"):
            if name not in given:
                raise UserError(f"--chosen-column and --rejected-column belong together: {flag_name(name)} is missing")
        if self.chosen_column == self.rejected_column:
            raise UserError(f"--chosen-column and --rejected-column both name {self.chosen_column!r}")
        for name in ("image_0_column", "image_1_column", "label_column"):
            if name in given:
                raise UserError(
                    f"{flag_name(name)} {given[name]}: --chosen-column and --rejected-column name both images and say "
                    f"which one is preferred; leave out {flag_name(name)}"
                )
        return self

    def by_field(self) -> dict[str, str | None]:
        """The columns by the fields of :class:`smpo_schemas.pairs.PairColumns`."""
        return {name.removesuffix("_column"): column for name, column in self}

    def as_flags(self) -> list[str]:
        """What is typed to choose the same columns."""
        given = {name: column for name, column in self if column is not None}
        return [word for name, column in given.items() for word in (flag_name(name), column)]


class JobOptions(Options):
    """How a job runs on Ray."""

    model_config = ConfigDict(title="Running")

    device: Device = None
    ray_address: RayAddress = None
    limit: Limit = None
    max_reject_rate: MaxRejectRate = 0.05
    overwrite: Overwrite = False

    @property
    def chosen_device(self) -> str:
        """The device, once the job has chosen one.

        Raises:
            RuntimeError: it has not.
        """
        if self.device is None:
            raise RuntimeError("no device is chosen yet")
        return self.device
