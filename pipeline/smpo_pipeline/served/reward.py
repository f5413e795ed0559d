"""The base class of rewards that a server computes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.rewards.base import Needs, Reward, Scored
from smpo_pipeline.served.address import Address


class ServedReward(Reward):
    """MODEL is the server's address, with options: ``URL,KEY=VALUE,...``. The option ``name`` names the columns."""

    default_model: ClassVar[str | None] = None
    needs: ClassVar[Needs] = Needs(threads=2, remote=True)
    address: ClassVar[type[Address]] = Address
    """Parses MODEL."""

    @classmethod
    def parse(cls, model: str | None) -> Address:
        """Parse MODEL.

        Raises:
            UserError: it is missing or wrong.
        """
        if not model:
            raise UserError(f"--reward {cls.name}: give the server's address: {cls.name}=http://HOST:PORT/PATH")
        return cls.address.parse(f"--reward {cls.name}={model}", model)

    @classmethod
    def named_by(cls, model: str | None) -> type[Reward]:
        """See the base class."""
        name = cls.parse(model).name
        return type(cls.__name__, (cls,), {"name": name}) if name else cls

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        return self.score_with_reasons(images, prompts).values

    @abstractmethod
    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        """See the base class."""
