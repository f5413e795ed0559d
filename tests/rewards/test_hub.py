"""Load rewards by their hub ids, from a hub cache in the layout of downloads, with parts in several repositories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import CLIPConfig, CLIPModel

from smpo_pipeline.rewards import load_reward

CODE = """
import json
from smpo_pipeline.rewards import load_reward
specs = ["pickscore", "pickscore=yuvalkirstain/PickScore_v1", "clipscore", "hpsv2",
         "hpsv2=xswu/HPSv2/HPS_v2.1_compressed.pt", "imagereward", "aesthetic=someone/copy/head.pth"]
print(json.dumps([(reward.model, reward.fingerprint) for reward in (load_reward(spec, "cpu") for spec in specs)]))
"""


def put(cache, repository, *files) -> None:
    """Put files into the cache as one commit of a repository: (name in the repository, source file) each."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    for name, path in files:
        shutil.copy(path, folder / "snapshots" / commit / name)


@pytest.mark.slow
def test_each_reward_is_found_by_its_hub_name(folders, tmp_path):
    clip, hps, image, head = (folders[name] for name in ("pickscore", "hpsv2", "imagereward", "aesthetic"))
    pick = tmp_path / "pick"
    config = CLIPConfig.from_pretrained(clip)
    config.text_config.vocab_size, config.text_config.eos_token_id = 49408, 49407
    CLIPModel(config).save_pretrained(pick)
    names = ("config.json", "model.safetensors")
    weights, pick_weights = ([(name, folder / name) for name in names] for folder in (clip, pick))
    tokens = [(file.name, file) for file in clip.iterdir() if "token" in file.name]
    pixels = [("preprocessor_config.json", clip / "preprocessor_config.json")]
    put(tmp_path, "yuvalkirstain/PickScore_v1", *pick_weights)
    put(tmp_path, "openai/clip-vit-large-patch14", *weights, *tokens, *pixels)
    words = [(name, hps / name) for name in ("vocab.json", "merges.txt")]
    put(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", *words, *pixels)
    checkpoint = hps / "HPS_v2_compressed.pt"
    put(tmp_path, "xswu/HPSv2", (checkpoint.name, checkpoint), ("HPS_v2.1_compressed.pt", checkpoint))
    put(tmp_path, "THUDM/ImageReward", *((name, image / name) for name in ("ImageReward.pt", "med_config.json")))
    put(tmp_path, "google-bert/bert-base-uncased", ("vocab.txt", image / "vocab.txt"))
    put(tmp_path, "someone/copy", ("head.pth", head / "sac+logos+ava1-l14-linearMSE.pth"))
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # PickScore's tokenizer comes from another repository than its weights.
    both = tmp_path / "both"
    both.mkdir()
    for name, path in (*pick_weights, *words, *pixels):
        shutil.copy(path, both / name)
    folders = {**folders, "pickscore": both}
    local = {name: load_reward(f"{name}={folder}", "cpu").fingerprint for name, folder in folders.items()}
    names = ["pickscore", "pickscore", "clipscore", "hpsv2", "hpsv2", "imagereward", "aesthetic"]
    assert [fingerprint for _, fingerprint in found] == [local[name] for name in names]
    assert [model for model, _ in found][:5] == [
        "yuvalkirstain/PickScore_v1",
        "yuvalkirstain/PickScore_v1",
        "openai/clip-vit-large-patch14",
        "xswu/HPSv2/HPS_v2_compressed.pt",
        "xswu/HPSv2/HPS_v2.1_compressed.pt",
    ]
