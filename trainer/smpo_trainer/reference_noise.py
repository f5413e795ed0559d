"""How far the stored reference is from what this run's arithmetic would compute, in margin units.

At step 0 the model is the reference, so every margin should be 0. It is not quite: ref_error was computed on other
hardware, in another dtype or batch, and beta multiplies the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOUD = 0.1
"""Standard deviation of a margin above which the noise is worth a warning: in the course of a run margins grow to
about 1, and this is a tenth of that, on every state, for the whole run."""


@dataclass(frozen=True)
class ReferenceNoise:
    """Statistics of h over the states of the first step.

    Attributes:
        std: root mean square (its true mean is 0).
        max: largest absolute value.
    """

    std: float
    max: float

    @property
    def is_loud(self) -> bool:
        """Whether it is worth a warning."""
        return self.std > LOUD

    def describe(self) -> str:
        """One line for the user."""
        line = f"arithmetic noise of the stored reference: margin std {self.std:.2g}, max {self.max:.2g} (true value 0)"
        if not self.is_loud:
            return line
        return (
            f"{line}. WARNING: margins grow to about 1 in training, so this drowns a part of the signal; "
            "use --reference live, a wider dtype in --mixed-precision, or a smaller --beta"
        )


def measure(margin_B: torch.Tensor) -> ReferenceNoise:
    """Noise from margins h [B] that would be 0 in exact arithmetic."""
    values = margin_B.detach().double()
    return ReferenceNoise(std=float(values.square().mean().sqrt()), max=float(values.abs().max()))
