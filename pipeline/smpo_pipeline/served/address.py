"""The address of a server with its options, as one value of a flag: ``URL`` or ``URL,KEY=VALUE,...``."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smpo_common.errors import UserError, describe_problem
from smpo_common.named_values import parse_options
from smpo_schemas.scoring.scores import REWARD_NAME


class Address(BaseModel):
    """A server, and how to ask it.

    Attributes:
        url: http or https, without a user or a password: it is recorded.
        name: of the scores' columns; None: the reward's own.
        timeout: seconds that an answer may take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str
    name: Annotated[str, Field(pattern=f"^{REWARD_NAME}$")] | None = None
    timeout: Annotated[float, Field(gt=0)] = 300.0

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)  # a ValueError is pydantic's to report
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://host:8000/path")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("give the address without user, password, query (?) and fragment (#)")
        return url.rstrip("/")

    @classmethod
    def parse(cls, flag: str, text: str) -> Self:
        """Parse ``URL,KEY=VALUE,...``.

        Args:
            flag: starts the error.
            text: the value.

        Raises:
            UserError: it has another form, or an option does not exist or has a wrong value.
        """
        url, *options = text.split(",")
        values = parse_options(flag, options)
        known = sorted(cls.model_fields.keys() - {"url"})
        for name in values.keys() - {*known}:
            raise UserError(f"{flag}: there is no option {name!r}; known: {', '.join(known)}")
        try:
            return cls.model_validate({**values, "url": url})
        except ValidationError as error:
            raise UserError(f"{flag}: {describe_problem(error)}") from error
