"""A trained model on the hub: ``smpo-train --push-to-hub`` and ``smpo-pipeline push``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from PIL import Image

from smpo_models.loading import load_family, load_tuned_denoiser
from smpo_models.sharing.model_card import model_metadata
from tests.command import assert_one_line, run_here
from tests.servers.hub_server import Hub
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pushing(capfd, shards: Path, model: Path, out: Path, **options):
    flags = arguments(shards, model, out, max_steps=1, lora_rank=2, push_to_hub="owner/tuned", **options)
    return run_here(capfd, "smpo-train", *flags)


def test_a_run_is_pushed_at_its_end_with_a_card(hub: Hub, shards: Path, model: Path, tmp_path, capfd):
    done = pushing(capfd, shards, model, tmp_path / "run", license="openrail++", hub_private_repo=True)
    assert done.returncode == 0, done.stderr
    page = f"{hub.url}/owner/tuned (private)"
    assert done.stdout.index(f"the result will be pushed to {page}") < done.stdout.index("saved")
    assert f"pushed to {page}" in done.stdout
    there = hub.folder("models/owner/tuned")
    assert files(there) == {"README.md", "pytorch_lora_weights.safetensors", "training.json", "metrics.jsonl"}
    name = "pytorch_lora_weights.safetensors"
    assert (there / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    card = RepoCard((there / "README.md").read_text())
    assert card.data.license == "openrail++"
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "smpo"} <= set(card.data.tags)
    assert card.data.get("base_model") is None  # a folder
    for text in ('load_lora_weights("owner/tuned")', "| reward taste | weight 1,", "| steps | 1 of 2 states", "lu2025"):
        assert text in card.text
    assert str(tmp_path) not in card.text
    # The settings say nothing of the hub: a run repeated from them must not replace this model.
    assert "push_to_hub" not in (tmp_path / "run" / "config.yaml").read_text()


def test_the_metadata_name_what_is_on_the_hub() -> None:
    shards = ["hf://datasets/me/shards/first", "s3://bucket/x"]
    data = model_metadata("org/base", "smpo", lora=True, shards=shards, license_=None)
    assert (data.base_model, data.base_model_relation, data.datasets) == ("org/base", "adapter", ["me/shards"])
    assert "license" not in data.to_yaml()


def test_a_failed_push_loses_nothing_and_says_how_to_repeat_it(hub: Hub, shards: Path, model: Path, tmp_path, capfd):
    hub.failing = "commit"
    run = tmp_path / "run"
    assert_one_line(
        pushing(capfd, shards, model, run), "500", f"complete in {run}", f"smpo-pipeline push {run} owner/tuned"
    )
    assert json.loads((run / "training.json").read_text())["steps"] == 1
    hub.failing = None
    # A finished run is not trained again, and pushed.
    done = pushing(capfd, shards, model, run)
    assert done.returncode == 0, done.stderr
    assert "finished; nothing to do" in done.stdout
    assert len(hub.uploads) == 1


@pytest.mark.parametrize(
    ("repository", "environment", "parts"),
    [
        ("owner/tuned", {"HF_TOKEN": ""}, ("no token", "hf auth login")),
        ("other/tuned", {}, ("may not write there",)),
        ("a/b/c", {}, ("OWNER/NAME",)),
    ],
)
def test_what_would_stop_a_push_stops_the_run_before_it_starts(
    hub: Hub, shards: Path, model: Path, tmp_path, capfd, monkeypatch, repository, environment, parts
):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("smpo_trainer.run._train", None)
    done = run_here(capfd, "smpo-train", *arguments(shards, model, tmp_path / "run", push_to_hub=repository))
    assert_one_line(done, f"--push-to-hub {repository}", *parts)


def test_an_evaluation_gives_the_card_its_numbers_and_samples(hub: Hub, train: Train, tmp_path, capfd):
    run = train("run", max_steps=1)
    evaluation = make_evaluation(tmp_path / "report", run)
    done = run_here(capfd, "smpo-pipeline", "push", run, "owner/tuned", "--evaluation", evaluation)
    assert done.returncode == 0, done.stderr
    there = hub.folder("models/owner/tuned")
    card = (there / "README.md").read_text()
    # By hand: tuned wins 3 of 4 images (2 prompts x 2), and gains (1 + 1 + 1 - 1) / 4.
    assert "| brightness (trained on) | 75.0 % |" in card
    assert "+0.5 (" in card
    assert "| a \\| b | ![0](samples/0-base.png) | ![0](samples/0-tuned.png) |" in card
    assert (there / "samples/1-tuned.png").read_bytes() == (evaluation / "images/tuned/00001-00.png").read_bytes()
    assert 'UNet2DConditionModel.from_pretrained("owner/tuned", subfolder="unet")' in card
    family = load_family(str(model_of(run)), ("denoiser",))
    load_tuned_denoiser(family, str(model_of(run)), there, "the pushed folder", None)
    other = shutil.copytree(run, tmp_path / "other")
    assert_one_line(
        run_here(capfd, "smpo-pipeline", "push", other, "owner/x", "--evaluation", evaluation),
        "no model from",
        "tuned=",
    )


def model_of(run: Path) -> Path:
    return Path(json.loads((run / "training.json").read_text())["model"])


def make_evaluation(folder: Path, run: Path) -> Path:
    """An evaluation of two prompts by two images, as ``evaluate`` leaves it."""
    import numpy as np

    from smpo_pipeline.evaluation.comparison import compare
    from smpo_pipeline.evaluation.results import (
        RESULTS_VERSION,
        Finding,
        ModelEntry,
        Results,
        RewardEntry,
        Settings,
        write_results,
        write_scores,
    )

    scores = {"base": np.array([[0.0, 0.0], [0.0, 0.0]]), "tuned": np.array([[1.0, 1.0], [1.0, -1.0]])}
    prompts, images = ["a | b", "a dog"], {}
    for name in scores:
        (folder / "images" / name).mkdir(parents=True)
        images[name] = [f"images/{name}/{prompt:05d}-{index:02d}.png" for prompt in range(2) for index in range(2)]
        for number, file in enumerate(images[name]):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / file)
    settings = Settings(
        models=dict.fromkeys(scores, "hash"), rewards={"brightness": "hash"}, prompts=prompts, images_per_prompt=2,
        steps=5, guidance_scale=1.0, seed=0, dtype="fp32",
    )  # fmt: skip
    findings = [
        Finding(
            model=name, reward="brightness", median=0, mean=0, std=0,
            versus_baseline=compare(values, scores["base"]) if name == "tuned" else None,
        )
        for name, values in scores.items()
    ]  # fmt: skip
    entries = [ModelEntry(name="base", source="base", base=None, denoiser="hash")]
    entries.append(
        ModelEntry(name="tuned", source=str(run), base="base", denoiser="hash", trained_rewards=["brightness"])
    )
    rewards = [RewardEntry(name="brightness", unit="grey level", model="none", fingerprint="hash")]
    write_scores(folder, {"brightness": scores}, settings, images)
    write_results(
        folder,
        Results(
            schema_version=RESULTS_VERSION, digest=settings.digest(), settings=settings, num_prompts=2, num_images=4,
            baseline="base", models=entries, rewards=rewards, findings=findings, versions={},
        ),
    )  # fmt: skip
    return folder
