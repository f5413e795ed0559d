"""The short form of tests/chaos.py."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest

from tests.chaos import Chaos

pytestmark = pytest.mark.long


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_both_stages_killed_at_random_give_the_same_output(tmp_path, store):
    with patch.dict(os.environ):
        chaos = Chaos(tmp_path, rows=200, inverted=18, store=store)
        try:
            assert chaos.run(seed=1, seconds=chaos.undisturbed(), most=2)
            assert store == "disk" or chaos.faults.injected.keys() == {"500", "503", "slow", "cut", "hang"}
        finally:
            chaos.close()
