"""A fingerprint covers everything that affects scores, and does not depend on the folder."""

from __future__ import annotations

import json
import shutil

import pytest

from smpo_pipeline.rewards import load_reward


def change(file, *keys, to):
    """Replace the value at ``keys`` in a JSON file by ``to(value)``."""
    content = json.loads(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to(place[keys[-1]])
    file.write_text(json.dumps(content))


def relu(_):
    return "relu"


def without_last(content):
    return content[:-1]


CHANGES = {
    "pickscore": [
        ("config.json", ("vision_config", "hidden_act"), relu),
        ("config.json", ("text_config", "hidden_act"), relu),
        ("config.json", ("text_config", "num_attention_heads"), lambda heads: heads // 2),
        ("config.json", ("vision_config", "layer_norm_eps"), lambda _: 0.1),
        ("preprocessor_config.json", ("image_mean",), lambda _: [0.5, 0.5, 0.5]),
        ("tokenizer.json", ("model", "merges"), without_last),
    ],
    "aesthetic": [("config.json", ("vision_config", "hidden_act"), relu)],
    "imagereward": [("med_config.json", ("hidden_act",), relu)],
}


@pytest.mark.parametrize(
    ("name", "file", "keys", "to"), [(name, *each) for name, changes in CHANGES.items() for each in changes]
)
def test_settings_are_in_it(name, file, keys, to, folders, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "copy")
    before = load_reward(f"{name}={folders[name]}", "cpu").fingerprint
    assert load_reward(f"{name}={folder}", "cpu").fingerprint == before
    change(folder / file, *keys, to=to)
    assert load_reward(f"{name}={folder}", "cpu").fingerprint != before


def test_the_tokenizer_is_in_it(folders, tmp_path):
    folder = shutil.copytree(folders["hpsv2"], tmp_path / "copy")
    before = load_reward(f"hpsv2={folder}", "cpu").fingerprint
    merges = folder / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:-1]) + "\n")
    assert load_reward(f"hpsv2={folder}", "cpu").fingerprint != before
