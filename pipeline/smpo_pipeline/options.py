"""Flags that several commands of ``smpo-pipeline`` share. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationInfo, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite, flag_name
from smpo_common.store_path import AnyPath, parse_path
from smpo_schemas.choices import Dtype
from smpo_schemas.layouts import find_layout, layouts
from smpo_schemas.pairs import ReadingChoices, expanded

# Validators; their UserErrors name the flag.


def _flag(info: ValidationInfo, value: object) -> str:
    """Format ``--flag value``."""
    return f"{flag_name(str(info.field_name))} {value}"


def _path(value: Any) -> AnyPath:  # noqa: ANN401  (a path, or a user's string)
    return parse_path(value) if isinstance(value, str) else value


def _local_path(value: Any) -> Path:  # noqa: ANN401  (a path, or a user's string)
    path = _path(value)
    if not isinstance(path, Path):
        raise UserError(f"{path} is a URL; this command reads local files only: download it first")
    return path


def _existing(path: AnyPath, info: ValidationInfo) -> AnyPath:
    """Refuse a path that does not exist; URLs are checked when they are read."""
    if isinstance(path, Path) and not path.exists():
        raise UserError(f"{_flag(info, path)} does not exist")
    return path.absolute()


def _matched(path: AnyPath, info: ValidationInfo) -> AnyPath:
    """Refuse a path or pattern that nothing matches."""
    return path.absolute() if expanded([path]) != [path] else _existing(path, info)


def _writable(path: AnyPath, info: ValidationInfo) -> AnyPath:
    """Refuse a folder that cannot be created because a file has its name or that of a parent."""
    if isinstance(path, Path):
        _refuse_files(path, (path, *path.parents), info)
    return path.absolute()


def _writable_file(path: Path, info: ValidationInfo) -> Path:
    """Refuse a file that cannot be written because a folder has its name, or a file that of a parent."""
    if path.is_dir():
        raise UserError(f"{_flag(info, path)} is a folder; name a file")
    _refuse_files(path, path.parents, info)
    return path


def _refuse_files(path: Path, folders: Sequence[Path], info: ValidationInfo) -> None:
    file = next((folder for folder in folders if folder.exists() and not folder.is_dir()), None)
    if file:
        raise UserError(f"{flag_name(str(info.field_name))}: cannot write {path}: {file} is a file, not a folder")


def _model_source(model: str, info: ValidationInfo) -> str:
    from smpo_models.hub import require_source  # noqa: PLC0415  (keeps --help quick)

    require_source(model, _flag(info, model))
    return absolute_model(model)


def absolute_model(model: str) -> str:
    """Make the path of an existing folder absolute; return anything else, such as a hub id, unchanged."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def absolute_spec(spec: str) -> str:
    """Make the path of a model in NAME=MODEL absolute: workers may have another working directory."""
    name, _, model = spec.partition("=")
    return f"{name}={absolute_model(model)}" if model else spec


def _known_rewards(specs: tuple[str, ...]) -> tuple[str, ...]:
    from smpo_pipeline.rewards import check_reward  # noqa: PLC0415  (keeps --help quick)

    return tuple(check_reward(spec) for spec in specs)


def _known_reward(spec: str) -> str:
    return _known_rewards((spec,))[0]


def _known_layout(name: str | None) -> str | None:
    return name and find_layout(name).name


def _known_device(device: str | None) -> str | None:
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: expected cpu or cuda")
    return device


def _batch_size(value: Any) -> int | None:  # noqa: ANN401  (a number, or a user's string)
    if value in (None, "auto"):
        return None
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(f"--batch-size {value}: expected a number from 1, or auto")


# Flags

FILE = Flag(typed=str, metavar="FILE", place=True)
FOLDER = Flag(typed=str, metavar="DIR", place=True)
FOLDER_OR_URL = Flag(typed=str, metavar="DIR|URL", place=True)

_AsText = PlainSerializer(str)
ExistingPathOrUrl = Annotated[AnyPath, PlainValidator(_path), AfterValidator(_existing), _AsText]
PathOrPattern = Annotated[AnyPath, PlainValidator(_path), AfterValidator(_matched), _AsText]
ExistingPath = Annotated[Path, AfterValidator(_existing)]
LocalPath = Annotated[Path, PlainValidator(_local_path)]
OutFile = Annotated[LocalPath, AfterValidator(_writable_file)]
ModelSource = Annotated[str, AfterValidator(_model_source)]

Pairs = Annotated[
    tuple[PathOrPattern, ...],
    Flag(typed=list[str], metavar="PATH|URL", place=True),
    Field(
        description="Pairs: Parquet, JSON, JSONL or WebDataset files, folders of them, or quoted patterns with *. "
        "Links are followed, hidden files skipped. The layouts of known data sets are recognised "
        "(docs/reference/layouts.md); name other columns by flags (--image-0-column, --chosen-column, ...)."
    ),
]
Out = Annotated[
    LocalPath,
    AfterValidator(_writable),
    FOLDER,
    Field(description="Output directory; created if missing."),
]
OutOrUrl = Annotated[
    AnyPath,
    PlainValidator(_path),
    AfterValidator(_writable),
    _AsText,
    FOLDER_OR_URL,
    Field(description="Output directory; created if missing. For URLs see docs/guide/storage.md."),
]
Rewards = Annotated[
    tuple[str, ...],
    AfterValidator(_known_rewards),
    Flag(metavar="NAME[=MODEL]", place="named"),
    Field(
        description="Reward: NAME, NAME=MODEL (hub id, folder, file or address), or MODULE:CLASS for your own. "
        "Repeatable. For example pickscore or pickscore=./my-pickscore. List of rewards: docs/guide/scoring.md."
    ),
]
OneReward = Annotated[
    str,
    AfterValidator(_known_reward),
    Flag(metavar="NAME[=MODEL]", place="named"),
    Field(description="Reward: NAME, NAME=MODEL (hub id, folder, file or address), or MODULE:CLASS for your own."),
]
LabelsFile = Annotated[
    ExistingPathOrUrl | None,
    Flag(typed=str, metavar="FILE|URL", place=True),
    Field(
        description="Output of `smpo-pipeline vote`: these labels replace those of the pairs. Labels of several "
        "annotators are averaged, and their number counts as votes."
    ),
]
Variant = Annotated[
    str | None,
    Field(
        description="Variant of the model's weight files, for example fp16. Default: the files without a variant, or "
        "the only variant there is."
    ),
]
Device = Annotated[
    str | None,
    AfterValidator(_known_device),
    Field(description="cpu or cuda; default: cuda if this machine (with --ray-address: the cluster) has a GPU."),
]
ModelDtype = Annotated[
    Dtype | None,
    Field(description="Dtype of the diffusion model; default: bf16 on GPUs that support it, else fp32."),
]
AutoBatchSize = Annotated[
    int | None,
    PlainValidator(_batch_size),
    PlainSerializer(lambda size: str(size or "auto")),
    Flag(typed=str),
    Field(
        description="Trajectories per model call, or auto: the largest batch that fits on the GPU; on CPU the smallest "
        "whose doubling gains less than 5 %."
    ),
]
Concurrency = Annotated[
    int | None,
    Field(
        ge=1,
        description="Maximum number of model actors, each with one GPU, or on CPU one core. Default: one per GPU or "
        "core.",
    ),
]
RayAddress = Annotated[str | None, Field(description="Address of a Ray cluster; default: start a local one.")]
Limit = Annotated[int | None, Field(ge=1, description="Use only the first N pairs.")]
MaxRejectRate = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Stop if a larger share of the pairs is rejected (of the first 200, then of all so far).",
    ),
]


def batches_in_words(batch_size: int | None, noun: str) -> str:
    """Say how large batches are; None: auto."""
    return "batches of automatic size" if batch_size is None else f"batches of {batch_size} {noun}"


class ColumnOptions(Options):
    """How the input's rows are read."""

    model_config = ConfigDict(title="Input (default: a known layout, or this project's column names)")

    layout: Annotated[
        str | None,
        AfterValidator(_known_layout),
        Flag(metavar="NAME"),
        Field(
            description="Layout of the input, in place of the one that is recognised: "
            f"{', '.join(sorted(layouts()))}. See docs/reference/layouts.md."
        ),
    ] = None
    image_root: Annotated[ExistingPathOrUrl | None, FOLDER_OR_URL] = None
    """Folder that image paths are relative to. Default: the input file's, or the one that its layout says."""
    axis: str | None = None
    """Which question the votes answer (preference, coherence, alignment, ...), where a data set has several. Default:
    preference."""
    min_confidence: Annotated[float | None, Field(ge=0, le=1)] = None
    """Reject pairs whose labels the data set is less sure of (HPDv3; its authors used 0.95). They do not count against
    --max-reject-rate."""
    prompt_column: str | None = None
    """Prompt."""
    image_0_column: str | None = None
    """First image: file bytes, or a path relative to the input file."""
    image_1_column: str | None = None
    """Second image."""
    label_column: str | None = None
    """Label, P(image_0 preferred): 1, 0, 0.5 for a tie, or a share of votes."""
    votes_column: str | None = None
    """Number of people that the label stands for."""
    pair_id_column: str | None = None
    """Stable id of the pair; if missing (null, NaN or blank), a hash of prompt and images."""
    annotator_column: str | None = None
    """Annotator who labelled the pair."""
    chosen_column: str | None = None
    """Preferred image, for data sets with chosen and rejected images instead of a label. A hash of the pair decides
    which one becomes image_0."""
    rejected_column: str | None = None
    """Other image; needs --chosen-column."""

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

    def choices(self) -> ReadingChoices:
        """Return what the flags say about reading the input."""
        columns = {name.removesuffix("_column"): column for name, column in self if name.endswith("_column")}
        return ReadingChoices(columns, self.layout, self.image_root, self.axis, self.min_confidence)

    def as_flags(self) -> list[str]:
        """Return the command-line arguments that choose the same."""
        return [word for name, value in self if value is not None for word in (flag_name(name), str(value))]


class JobOptions(Options):
    """Settings of a job on Ray."""

    model_config = ConfigDict(title="Running")

    device: Device = None
    ray_address: RayAddress = None
    limit: Limit = None
    max_reject_rate: MaxRejectRate = 0.05
    overwrite: Overwrite = False
    """Start over. Without it an unfinished run is resumed and a finished one is kept."""

    @property
    def chosen_device(self) -> str:
        """The device, after the job has resolved it.

        Raises:
            RuntimeError: it has not yet.
        """
        if self.device is None:
            raise RuntimeError("the device is not resolved yet")
        return self.device


class CostOptions(Options):
    """Settings of a plan."""

    model_config = ConfigDict(title="Plan")

    gpus: Annotated[int, Field(ge=1)] = 1
    """Number of devices (on CPU: cores) to plan for."""
    price: Annotated[float | None, Field(ge=0)] = None
    """Dollars per device hour."""
    seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """Seconds to measure, warm-up included."""
    json_: Annotated[OutFile | None, FILE] = None
    """Write the plan to this file as JSON, too."""
