from __future__ import annotations

import pytest

from smpo_common.errors import UserError
from smpo_common.same_settings import require_same_settings


def test_each_difference_is_named_with_both_values():
    stored = {"seed": 0, "steps": {"lr": 0.1, "warmup": 5}, "gone": True, "same": [1]}
    current = {"seed": 1, "steps": {"lr": 0.2, "warmup": 5}, "same": [1], "long": "x" * 200}
    message = (
        r"^--out a .*a finished run.* \(seed: 0 there, 1 here; steps.lr: 0.1 there, 0.2 here; "
        r"long; gone: True there, None here\); .*--out.*--overwrite"
    )
    with pytest.raises(UserError, match=message):
        require_same_settings("--out a", "a finished run", stored, current)


def test_equal_settings_pass_and_a_damaged_record_does_not():
    require_same_settings("a", "a finished run", {"seed": 0}, {"seed": 0})
    with pytest.raises(UserError, match="its record is malformed"):
        require_same_settings("a", "a finished run", ["seed"], {"seed": 0})
