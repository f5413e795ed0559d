"""The best checkpoint by the reward of validation images, and the end of a run whose reward falls."""

from __future__ import annotations

from typing import Any


class BestCheckpoint:
    """Follows the reward of the validation images.

    Attributes:
        step: number of finished steps of the best checkpoint; None without one.
        reward: its mean reward.
        is_kept: whether its model is kept in ``OUT/best``; false between its checkpoint and the copy.
    """

    is_kept: bool = True

    def __init__(self, patience: int) -> None:
        """End the run after ``patience`` evaluations in a row that are not the best so far."""
        self.step: int | None = None
        self.reward: float | None = None
        self._patience, self._worse = patience, 0

    def update(self, step: int, reward: float) -> bool:
        """Record the reward after ``step`` steps; return whether it is the best so far."""
        is_best = self.reward is None or reward > self.reward
        if is_best:
            self.step, self.reward, self.is_kept, self._worse = step, reward, False, 0
        else:
            self._worse += 1
        return is_best

    @property
    def has_fallen(self) -> bool:
        """Whether the run should end."""
        return self._worse >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"step": self.step, "reward": self.reward, "worse": self._worse, "is_kept": self.is_kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.step, self.reward, self._worse = state["step"], state["reward"], state["worse"]
        self.is_kept = state.get("is_kept", True)  # not in checkpoints of older versions
