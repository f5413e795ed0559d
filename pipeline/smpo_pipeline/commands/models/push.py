"""``smpo-pipeline push``."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console

from smpo_common.options import Flag, Options
from smpo_pipeline.options import FOLDER, ExistingPath, LocalPath


class PushOptions(Options):
    """The flags of ``push``."""

    folder: Annotated[ExistingPath, Flag(positional=True, metavar="FOLDER")]
    """Finished output of generate, score, select, invert or smpo-train."""
    repository: Annotated[str, Flag(positional=True, metavar="OWNER/NAME")]
    """Data set on the hub to push to or, for an output of smpo-train, model. Created if missing."""
    license_: Annotated[str | None, Flag(metavar="ID")] = None
    """License by the hub's identifier, such as cc-by-4.0. Required for data sets: it is that of the images and prompts
    that the data was made from, and is never guessed."""
    evaluation: Annotated[LocalPath | None, FOLDER] = None
    """For an output of smpo-train: output of evaluate that compared it, for win rates and samples in the model card."""
    hub_private_repo: bool = False
    """Make a new repository private. Default: public, unless its organisation chose otherwise."""


def push(options: PushOptions) -> None:
    """Upload an output folder to the Hugging Face hub, with a card (README.md) that describes it.

    Needs a token: `hf auth login`, or HF_TOKEN. Run it again after a failure or a change: files that are there already
    are not sent again. A README.md of your own in the folder is pushed as it is.

    Examples:
        smpo-pipeline push shards OWNER/NAME --license cc-by-4.0
    """
    from smpo_pipeline.sharing.push import push_folder  # noqa: PLC0415  (keeps --help quick)

    push_folder(
        options.folder,
        options.repository,
        Console(markup=False),
        license_=options.license_,
        evaluation=options.evaluation,
        private=options.hub_private_repo,
    )
