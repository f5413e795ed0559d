from __future__ import annotations

import shutil

import pytest
import torch

from smpo_common.errors import UserError
from smpo_models import hub
from smpo_models.hub import require_source
from smpo_models.loading import load_family
from smpo_models.weights import holds
from tests.tiny.stable_diffusion import make_tiny_model


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


def test_the_cache_tells_the_dtype_of_a_hub_ids_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    make_tiny_model(snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    unet = load_family("org/name", ("denoiser",), denoiser_dtype=torch.bfloat16).denoiser
    assert unet.dtype == torch.float32
    torch.nn.Module.to(unet, torch.bfloat16).save_pretrained(snapshot / "unet")
    assert load_family("org/name", ("denoiser",), denoiser_dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16
    assert holds(torch.bfloat16, "org/name", "--model M", variant=None, subfolder="unet")
    assert not holds(torch.bfloat16, "org/name", "--model M", variant="fp16", subfolder="unet")
    shutil.rmtree(snapshot / "unet")
    assert not holds(torch.bfloat16, "org/name", "--model M", variant=None, subfolder="unet")
