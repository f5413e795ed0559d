"""Push an output folder to the hub: a data set, or a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import RepoCard
from rich.console import Console

from smpo_common.errors import UserError
from smpo_models.sharing.card import CARD_FILE, own_card
from smpo_models.sharing.model_card import model_card, shared_files
from smpo_models.sharing.repository import RepositoryKind, open_repository, push_files, require_repository_name
from smpo_pipeline.sharing.contents import read_contents
from smpo_pipeline.sharing.dataset_card import dataset_card
from smpo_pipeline.sharing.evaluation import evaluation_table, name_in, read_evaluation, sample_images
from smpo_pipeline.terminal import format_bytes
from smpo_schemas.trained_model import TRAINING_FILE


def push_folder(
    folder: Path, name: str, console: Console, *, license_: str | None, evaluation: Path | None, private: bool
) -> None:
    """Push what a stage made.

    Args:
        folder: finished output of a stage.
        name: of the repository.
        console: to print to.
        license_: of data set or model, an identifier of the hub.
        evaluation: output of ``evaluate`` that compared this model.
        private: make a new repository private.

    Raises:
        UserError: the folder cannot be shared, or the hub does not take it.
    """
    require_repository_name(name, name)
    if (folder / TRAINING_FILE).is_file():
        kind: RepositoryKind = "model"
        files, card = _model(folder, name, license_, evaluation)
    else:
        kind = "dataset"
        files, card = _dataset(folder, name, license_, evaluation)
    repository = open_repository(name, kind, card, name, private=private)
    size = sum(path.stat().st_size for path in files.values())
    console.print(f"{len(files)} files, {format_bytes(size)}, to {repository}", soft_wrap=True, highlight=False)
    push_files(repository, {**files, CARD_FILE: card}, "Upload by smpo-pipeline push")
    console.print(f"pushed to {repository.url}", soft_wrap=True, highlight=False)


def _model(folder: Path, name: str, license_: str | None, evaluation: Path | None) -> tuple[dict[str, Path], str]:
    files, card = shared_files(folder), own_card(folder)
    if card is not None:
        _refuse_for_own_card(folder, {"--license": license_, "--evaluation": evaluation})
        return files, card
    if evaluation is None:
        return files, model_card(folder, name, license_)
    results = read_evaluation(evaluation)
    known_as = name_in(results, folder, evaluation)
    samples, images = sample_images(results, evaluation, known_as)
    return {**files, **images}, model_card(folder, name, license_, evaluation_table(results, known_as), samples)


def _dataset(folder: Path, name: str, license_: str | None, evaluation: Path | None) -> tuple[dict[str, Path], str]:
    contents, card = read_contents(folder), own_card(folder)
    if evaluation is not None:
        raise UserError(f"--evaluation {evaluation}: {folder} holds {contents.kind}, not a model")
    if card is not None:
        _refuse_for_own_card(folder, {"--license": license_})
        if not RepoCard(card, ignore_metadata_errors=True).data.get("license"):
            raise UserError(f"{folder / CARD_FILE} names no license: add `license: ID` to the metadata at its top")
        return contents.files, card
    if license_ is None:
        raise UserError(
            f"{folder}: name the license of the data with --license, by the hub's identifier, such as cc-by-4.0; it is "
            "that of the images and prompts it was made from, and is not guessed"
        )
    return contents.files, dataset_card(contents, name, license_)


def _refuse_for_own_card(folder: Path, given: Mapping[str, object]) -> None:
    flag = next((flag for flag, value in given.items() if value is not None), None)
    if flag:
        raise UserError(f"{flag}: {folder / CARD_FILE} is your own and is pushed as it is; change it, or move it away")
