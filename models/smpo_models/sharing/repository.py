"""A repository on the hub. It is opened before the work starts, so that what would stop the push is found first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub import HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from smpo_common.errors import UserError

RepositoryKind = Literal["model", "dataset"]

_REFUSED = {
    HTTPStatus.UNAUTHORIZED: "the hub does not know this token; run `hf auth login`, or set HF_TOKEN",
    HTTPStatus.FORBIDDEN: "this token may not write there; it needs the role `write`, and its owner access to the "
    "repository or, for a new one, to the organisation",
}


@dataclass(frozen=True)
class Repository:
    """A repository that the user's token may write to.

    Attributes:
        id: ``OWNER/NAME``.
        kind: ``model`` or ``dataset``.
        private: whether only its owner can see it.
    """

    id: str
    kind: RepositoryKind
    private: bool

    @property
    def url(self) -> str:
        """Its page."""
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{folder}{self.id}"

    def __str__(self) -> str:
        return f"{self.url} ({'private' if self.private else 'public'})"


def require_repository_name(name: str, what: str) -> None:
    """Refuse a name that no repository can have.

    Args:
        name: as the user gave it.
        what: starts the error.

    Raises:
        UserError: it is neither OWNER/NAME nor NAME.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{what}: write OWNER/NAME, with letters, digits and . _ - only: {error}") from None


def open_repository(name: str, kind: RepositoryKind, card: str, what: str, *, private: bool) -> Repository:
    """Create a repository unless it exists, and check that it can be pushed to.

    Args:
        name: ``OWNER/NAME``; a NAME alone belongs to the token's owner.
        kind: ``model`` or ``dataset``.
        card: the README.md to be pushed, at least its metadata, for the hub to check.
        what: starts the error, for example ``--push-to-hub me/model``.
        private: make a new repository private; else the owner's usual visibility, public unless an organisation chose
            otherwise, applies.

    Raises:
        UserError: there is no token or no permission, the hub refuses the metadata or cannot be reached, or the
            repository exists and is public though ``private`` was asked for.
    """
    require_repository_name(name, what)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}: HF_HUB_OFFLINE=1 forbids reaching the hub; unset it")
    if get_token() is None:
        raise UserError(f"{what}: there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    hub = _hub()
    with explained(what):
        RepoCard(card, ignore_metadata_errors=False).validate(repo_type=kind)
        made = hub.create_repo(name, repo_type=kind, private=private or None, exist_ok=True).repo_id
        hub.auth_check(made, repo_type=kind, write=True)
        repository = Repository(made, kind, bool(hub.repo_info(made, repo_type=kind).private))
    if private and not repository.private:
        raise UserError(
            f"{what}: {repository.url} exists and is public; make it private in its settings, or leave out "
            "--hub-private-repo"
        )
    return repository


def push_files(repository: Repository, files: Mapping[str, Path | str], message: str) -> None:
    """Upload files; those that the repository holds already, unchanged, are not sent again.

    Args:
        repository: where to.
        files: by their path in the repository: a local file, or a text.
        message: of the commit.

    Raises:
        UserError: the hub refuses them or cannot be reached.
    """
    # The hub's library uploads folders, so that the files are linked into a temporary one.
    with tempfile.TemporaryDirectory(prefix="smpo-push-") as staging:
        for name, content in files.items():
            target = Path(staging, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
            else:
                target.symlink_to(content.resolve())
        with explained(repository.url):
            _hub().upload_folder(
                repo_id=repository.id, repo_type=repository.kind, folder_path=staging, commit_message=message
            )


def _hub() -> HfApi:
    return HfApi(endpoint=constants.ENDPOINT)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of a request to the hub into one line that starts with ``what``.

    Raises:
        UserError: the request failed.
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = HTTPStatus(error.response.status_code)
        raise UserError(f"{what}: {_REFUSED.get(status, error)}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"{what}: cannot reach {constants.ENDPOINT}: {error}") from None
    except (ValueError, RuntimeError) as error:  # metadata that the hub refuses; an upload that failed
        raise UserError(f"{what}: {error}{f': {error.__cause__}' if error.__cause__ else ''}") from None
