"""A short piece of ``python -m tests.fuzz``: seeds that a whole campaign reads too."""

from __future__ import annotations

import pytest

from tests.fuzz import campaign


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("images", 100), ("files", 40), ("layouts", 40)])
def test_hostile_inputs_are_read_rejected_or_refused(kind, count):
    findings = campaign(kind, 0, count)
    assert findings.problems == {}
    assert sum(findings.outcomes.values()) == count
    assert findings.outcomes["read"]
    assert findings.outcomes["rejected"] + findings.outcomes["refused"]


@pytest.mark.slow
def test_a_seed_makes_the_same_input_in_any_process():
    first, again = campaign("images", 40, 45), campaign("images", 40, 45)
    assert first.outcomes == again.outcomes
