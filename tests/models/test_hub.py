from __future__ import annotations

import pytest

from smpo_common.errors import UserError
from smpo_models import hub
from smpo_models.hub import require_source
from smpo_models.loading import load_family


@pytest.mark.parametrize("source", ["./nope", "/nope/x", "a/b/c"])
def test_what_can_only_be_a_folder_is_said_to_be_none(source: str) -> None:
    for load in (load_family, lambda model: require_source(model, f"--model {model}")):
        with pytest.raises(UserError, match=f"--model {source}: no such folder"):
            load(source)


def test_a_hub_id_is_looked_for_in_the_cache_where_the_hub_is_not_to_be_asked(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--model org/name: no such folder.* not in the cache .* HF_HUB_OFFLINE=1"):
        require_source("org/name", "--model org/name")
    (tmp_path / "models--org--name").mkdir()
    require_source("org/name", "--model org/name")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    require_source("org/other", "--model org/other")
