"""The result of a run on the Hugging Face hub (``--push-to-hub``)."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from smpo_common.errors import UserError
from smpo_models.sharing.card import CARD_FILE, own_card
from smpo_models.sharing.model_card import model_card, model_metadata, shared_files
from smpo_models.sharing.repository import Repository, open_repository, push_files
from smpo_trainer.settings import TrainSettings


def open_result(settings: TrainSettings) -> Repository | None:
    """Open the repository of ``--push-to-hub``, if there is one.

    Raises:
        UserError: it cannot be pushed to.
    """
    sharing = settings.sharing
    if sharing.push_to_hub is None:
        return None
    lora = settings.denoiser.lora_rank is not None
    metadata = model_metadata(
        settings.model, settings.loss.objective, lora=lora, shards=list(settings.shards), license_=sharing.license_
    )
    card = own_card(settings.out) or f"---\n{metadata.to_yaml()}\n---\n"
    what = f"--push-to-hub {sharing.push_to_hub}"
    return open_repository(sharing.push_to_hub, "model", card, what, private=sharing.hub_private_repo)


def push_result(settings: TrainSettings, repository: Repository, say: Callable[[str], None]) -> None:
    """Upload a finished run.

    Raises:
        UserError: it could not be uploaded; the folder is complete, and the error says how to push it again.
    """
    out, license_ = settings.out, settings.sharing.license_
    try:
        card = own_card(out) or model_card(out, repository.id, license_)
        push_files(repository, {**shared_files(out), CARD_FILE: card}, "Upload by smpo-train")
    except UserError as error:
        again = ["smpo-pipeline", "push", str(out), repository.id, *(["--license", license_] if license_ else [])]
        raise UserError(f"{error}; the run is complete in {out}: push it again with: {shlex.join(again)}") from None
    say(f"pushed to {repository}")
