"""``generate --plan``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.generation.generator import Generator
from tests.command import run_here
from tests.tiny.stable_diffusion import make_tiny_model


def test_the_plan_is_the_measured_rate_times_the_images(tmp_path, capfd, monkeypatch):
    model, target = make_tiny_model(tmp_path / "model"), tmp_path / "plan.json"
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": each}) for each in ("a cat", "a dog", "")))
    made, inner = [], Generator.sample

    def sample(self, wanted, *more):
        images = inner(self, wanted, *more)
        made.append(list(zip(wanted, images, strict=True)))
        return images

    monkeypatch.setattr(Generator, "sample", sample)
    fixed = ("--model", model, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out", "--device", "cpu")
    few = ("--images-per-prompt", 4, "--steps", 3, "--batch-size", 3, "--prompts-per-file", 1, "--keep", "states:2")
    costs = ("--plan", "--gpus", 4, "--price", 2.5, "--seconds", 1, "--json", target)
    done = run_here(capfd, "smpo-pipeline", "generate", *fixed, *few, *costs)
    assert done.returncode == 0, done.stderr
    assert "2 prompts x 4 images of 32 x 32 pixels" in done.stdout
    assert not (tmp_path / "out").exists()
    plan = json.loads(target.read_text())
    warm_up, *measured = made
    assert [wanted for wanted, _ in [*warm_up, *measured[0]]][:6] == [
        *(("a cat", index) for index in range(4)),
        *(("a dog", index) for index in range(2)),
    ]
    assert plan["measured_images"] == sum(map(len, measured))
    assert plan["forwards_per_image"] == 2 * 3  # guidance asks twice
    rate = plan["measured_images"] / plan["measured_seconds"]
    # What was encoded, and three latents in float32.
    first = [image for batch in made for _, image in batch][:32]
    size = np.mean([len(encode_image(np.asarray(each.image), "png")) for each in first]) + 3 * 4 * 4 * 8 * 8
    assert plan["bytes_per_image"] == pytest.approx(size)
    own, *larger = plan["projections"]
    assert [each["prompts"] for each in (own, *larger)] == [2, 10_000, 1_000_000]
    for each in (own, *larger):
        hours = 4 * each["prompts"] / rate / 3600
        assert (each["images"], each["files"]) == (4 * each["prompts"], each["prompts"])
        assert each["device_hours"] == pytest.approx(hours)
        assert each["wall_hours"] == pytest.approx(hours / 4)
        assert each["dollars"] == pytest.approx(hours * 2.5)
        assert each["bytes"] == pytest.approx(4 * each["prompts"] * size, abs=1)


def test_a_plan_with_prompts_is_that_of_generate(tmp_path, capfd, monkeypatch):
    planned = []
    monkeypatch.setattr("smpo_pipeline.commands.pairs.generate._plan", planned.append)
    (tmp_path / "prompts.txt").write_text("a cat")
    flags = ("--model", make_tiny_model(tmp_path / "model"), "--images-per-prompt", 6, "--gpus", 4)
    for out in ((), ("--out", tmp_path / "out")):
        done = run_here(capfd, "smpo-pipeline", "plan", *flags, f"--prompts={tmp_path / 'prompts.txt'}", *out)
        assert done.returncode == 0, done.stderr
    assert [(each.sampling.images_per_prompt, each.planning.gpus) for each in planned] == [(6, 4)] * 2
    assert [each.out.name for each in planned] == ["candidates", "out"]
    pairs = run_here(capfd, "smpo-pipeline", "plan", "--model", tmp_path / "model", "--pairs", tmp_path / "nope")
    assert "--pairs" in pairs.stderr
