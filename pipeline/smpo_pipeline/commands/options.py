"""Flags that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from smpo_common.errors import UserError
from smpo_common.store_path import parse_path


def existing(flag: str) -> Callable[[Any], Any]:
    """A callback for flags whose paths must be there; URLs are asked for later, and None is none.

    Raises:
        UserError: nothing is at a path.
    """

    def check(given: Any) -> Any:  # noqa: ANN401  (whatever the flag holds)
        for text in given if isinstance(given, (list, tuple)) else [given]:
            path = None if text is None else parse_path(str(text))
            if isinstance(path, Path) and not path.exists():
                raise UserError(f"{flag} {text} does not exist")
        return given

    return check


def model_source(flag: str) -> Callable[[str | None], str | None]:
    """A callback for models: folders, or ids of the hub.

    Raises:
        UserError: see :func:`smpo_models.hub.require_source`.
    """

    def check(given: str | None) -> str | None:
        if given is not None:
            from smpo_models.hub import require_source  # noqa: PLC0415  (keeps --help quick)

            require_source(given, f"{flag} {given}")
        return given

    return check


def writable(flag: str, *, file: bool = False) -> Callable[[Any], Any]:
    """A callback for what is written at the end: a folder, or a file, that can be at the path given; None is none.

    Raises:
        UserError: something else is there, or above it.
    """

    def check(given: Any) -> Any:  # noqa: ANN401  (a path, a URL or None)
        path = None if given is None else parse_path(str(given))
        if isinstance(path, Path):
            if file and path.is_dir():
                raise UserError(f"{flag} {path} is a folder; name a file")
            above = path.parents if file else (path, *path.parents)
            wrong = next((each for each in above if each.exists() and not each.is_dir()), None)
            if wrong:
                raise UserError(f"{flag}: cannot write {path}: {wrong} is no folder")
        return given

    return check


def _known_rewards(given: list[str]) -> list[str]:
    from smpo_pipeline.rewards import check_reward  # noqa: PLC0415  (keeps --help quick)

    return [check_reward(spec) for spec in given]


def _known_device(given: str | None) -> str | None:
    if given not in (None, "cpu", "cuda"):
        raise UserError(f"--device {given}: cpu or cuda")
    return given


def _valid_batch_size(given: str) -> str:
    parse_batch_size(given)
    return given


PairsOption = Annotated[
    list[str],
    typer.Option(
        "--pairs",
        callback=existing("--pairs"),
        metavar="PATH|URL",
        help="Parquet or JSONL files, or folders of them (links are followed, hidden names left out), one row a pair. "
        "Pick-a-Pic v2's columns are known.",
    ),
]


def local_path(text: str) -> Path:
    """What a user wrote where only a path of this machine will do.

    Raises:
        UserError: it is a URL.
    """
    path = parse_path(text)
    if not isinstance(path, Path):
        raise UserError(f"{path} is a URL; this command takes paths of this machine: copy it here first")
    return path


OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="DIR",
        parser=local_path,
        callback=writable("--out"),
        help="Output directory; made where it is missing.",
    ),
]
OutOrUrlOption = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="DIR|URL",
        callback=writable("--out"),
        help="Output directory; made where it is missing. URLs: docs/storage.md.",
    ),
]
RewardsOption = Annotated[
    list[str],
    typer.Option(
        "--reward",
        callback=_known_rewards,
        help="NAME, NAME=MODEL (hub id, folder or file) or your own MODULE:CLASS, repeatable, for example pickscore or "
        "pickscore=./my-pickscore. Which there are and what each says: docs/rewards.md.",
    ),
]

_COLUMNS = "Input columns (where they are not Pick-a-Pic's or the normalised names)"


def _column(name: str, help_text: str) -> Any:  # noqa: ANN401  (an annotation object has no public type)
    return Annotated[str | None, typer.Option(f"--{name}-column", help=help_text, rich_help_panel=_COLUMNS)]


PromptColumn = _column("prompt", "Text of the prompt.")
Image0Column = _column("image-0", "First image: file bytes, or a path relative to the input file.")
Image1Column = _column("image-1", "Second image.")
LabelColumn = _column("label", "P(image_0 preferred): 1, 0, or 0.5 for a tie.")
PairIdColumn = _column(
    "pair-id", "Stable name of the pair; without one (null, NaN and blank are none), a hash of prompt and images."
)
AnnotatorColumn = _column("annotator", "Who labelled the pair.")

RUNNING = "Running"
AutoBatchSizeOption = Annotated[
    str,
    typer.Option(
        "--batch-size",
        callback=_valid_batch_size,
        help="Trajectories per model call, or auto: the largest that fits on the GPU; on a CPU the smallest whose "
        "doubling gains less than 5 %.",
        rich_help_panel=RUNNING,
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="Variant of the model's files of weights, for example fp16. Default: those without one, or the only one "
        "that is there.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        callback=_known_device,
        help="cpu or cuda; default: cuda where this machine (with --ray-address: the cluster) has a GPU.",
        rich_help_panel=RUNNING,
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        min=1,
        help="Model actors at once, at the most; one GPU each, or one core. Default: one a GPU, or a core.",
        rich_help_panel=RUNNING,
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="Ray cluster to run on; default: one of its own.", rich_help_panel=RUNNING),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first N pairs.", rich_help_panel=RUNNING)
]
MaxRejectRateOption = Annotated[
    float,
    typer.Option(
        "--max-reject-rate",
        min=0,
        max=1,
        help="Stop when more of the pairs are rejected than this (of the first 200, or of all so far).",
        rich_help_panel=RUNNING,
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Begin anew. Without it an unfinished run is continued and a finished one left alone.",
        rich_help_panel=RUNNING,
    ),
]


def parse_batch_size(value: str) -> int | None:
    """A number from 1, or None for ``auto``.

    Raises:
        UserError: neither.
    """
    if value == "auto":
        return None
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(f"--batch-size {value}: a number from 1, or auto")


COLUMN_FIELDS = ("prompt", "image_0", "image_1", "label", "pair_id", "annotator")
"""The parameters of :func:`columns_by_field`, in order."""


def columns_by_field(
    prompt: str | None,
    image_0: str | None,
    image_1: str | None,
    label: str | None,
    pair_id: str | None,
    annotator: str | None,
) -> dict[str, str | None]:
    """The column flags by the fields of :class:`smpo_schemas.pairs.PairColumns`."""
    return {
        "prompt": prompt,
        "image_0": image_0,
        "image_1": image_1,
        "label": label,
        "pair_id": pair_id,
        "annotator": annotator,
    }
