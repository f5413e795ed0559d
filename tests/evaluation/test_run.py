from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_pipeline.evaluation.evaluation import finished_results
from smpo_pipeline.evaluation.results import read_results
from smpo_pipeline.evaluation.summary import headline, print_results
from smpo_pipeline.generation.suites import PromptSource
from smpo_pipeline.rewards import Reward
from tests.command import run_command
from tests.evaluation.stubs import STUBS, EvaluationMaker, run
from tests.tiny.stable_diffusion import make_tiny_unet

pytestmark = pytest.mark.usefixtures("stub_rewards")


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def test_the_whole_evaluation(
    plan_of: EvaluationMaker, quiet: Console, models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,category\na cat,one\na dog,\ncat and dog <b>,two\n")
    prompts = PromptSource(None, tmp_path / "prompts.csv")
    evaluation = plan_of(reward=["brightness", "redness"], prompts=prompts)
    assert finished_results(evaluation, overwrite=False) is None
    results = run(evaluation, quiet)
    assert read_results(evaluation.out) == results
    assert finished_results(evaluation, overwrite=False) == results
    assert (results.num_prompts, results.num_images, results.baseline) == (3, 9, "base")

    table = pq.read_table(evaluation.out / "scores.parquet").to_pydict()
    assert len(table["model"]) == 18
    assert all((evaluation.out / file).is_file() for file in table["file"])
    assert set(zip(table["prompt"], table["category"], strict=True)) == {
        ("a cat", "one"),
        ("a dog", None),
        ("cat and dog <b>", "two"),
    }
    assert results.settings.categories == ["one", "", "two"]
    scores = {
        model: np.array([value for name, value in zip(table["model"], table["redness"], strict=True) if name == model])
        for model in ("base", "tuned")
    }
    finding = results.finding("tuned", "redness")
    assert finding.median == pytest.approx(np.median(scores["tuned"]))
    assert finding.mean == pytest.approx(scores["tuned"].mean())
    versus = finding.versus_baseline
    assert versus is not None
    assert versus.wins == (scores["tuned"] > scores["base"]).sum()
    assert versus.mean_difference.value == pytest.approx((scores["tuned"] - scores["base"]).mean())
    assert versus.win_rate.low <= versus.win_rate.value <= versus.win_rate.high
    assert results.finding("base", "redness").versus_baseline is None

    denoiser = load_family(str(models["base"]), ("denoiser",)).denoiser
    assert denoiser is not None
    assert results.models[0].denoiser == fingerprint_module(denoiser)
    assert (results.models[0].base, results.models[1].base) == (None, str(models["base"]))
    assert [model.trained_rewards for model in results.models] == [[], ["redness"]]
    assert (results.models[0].training, results.models[1].training["objective"]) == ({}, "smpo")


def test_report_is_self_contained(plan_of: EvaluationMaker, quiet: Console) -> None:
    evaluation = plan_of(reward=["brightness", "redness"])
    run(evaluation, quiet)
    page = (evaluation.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert set(re.findall(r'src="([^,"]*)', page)) == {"data:image/png;base64"}
    assert "cat and dog &lt;b&gt;" in page
    assert "<b>" in page
    assert "cat and dog <b>" not in page
    assert "Training of tuned" in page
    assert "<strong>loss</strong>" in page


@pytest.mark.slow
def test_same_model_twice_ties(plan_of: EvaluationMaker, quiet: Console, models: dict[str, Path]) -> None:
    evaluation = plan_of(model=[f"one={models['base']}", f"two={models['base']}"])
    versus = run(evaluation, quiet).finding("two", "brightness").versus_baseline
    assert versus is not None
    assert (versus.win_rate.value, versus.ties) == (0.5, 9)


@pytest.mark.slow
def test_folders_of_images_are_compared_like_models(
    plan_of: EvaluationMaker, quiet: Console, models: dict[str, Path], tmp_path: Path
) -> None:
    first = plan_of()
    run(first, quiet)
    base, tuned = (f"{name}={first.folder(name)}" for name in ("base", "tuned"))
    for file in (tmp_path / "out" / "images").glob("*/made_from.json"):
        file.unlink()  # not made by an evaluation
    both = plan_of(out=tmp_path / "both", model=(f"model={models['base']}",), images=(base, tuned))
    results = run(both, quiet)
    assert finished_results(both, overwrite=False) == results
    assert [(model.name, model.source, model.denoiser == "") for model in results.models] == [
        ("model", str(models["base"]), False),
        ("base", str(first.folder("base")), True),
        ("tuned", str(first.folder("tuned")), True),
    ]
    same = results.finding("base", "brightness").versus_baseline
    assert same is not None
    assert same.ties == 9
    alone = plan_of(out=tmp_path / "alone", model=(), images=(tuned, base))
    console = Console(record=True, width=200)
    found = run(alone, console)
    assert "3 prompts x 3 images made elsewhere" in console.export_text()
    assert (found.baseline, found.settings.sampler, found.settings.steps) == ("tuned", "", 0)
    assert found.finding("base", "brightness").mean == results.finding("base", "brightness").mean
    files = pq.read_table(alone.out / "scores.parquet")["file"].to_pylist()
    assert files[0] == str(first.folder("tuned") / "00000-00.png")
    # Another image is another evaluation.
    Image.new("RGB", (32, 32)).save(first.folder("tuned") / "00002-02.png")
    changed = plan_of(out=tmp_path / "alone", model=(), images=(tuned, base))
    with pytest.raises(UserError, match="other settings .models"):
        finished_results(changed, overwrite=False)
    for images, words in (((base, base), "the name 'base' is used twice"), ((), "name at least one model .*--images")):
        with pytest.raises(UserError, match=words):
            plan_of(model=(), images=images)


def test_rewards_score_in_the_dtype_of_the_flag(
    plan_of: EvaluationMaker, quiet: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in `score`: those of vision-language models load their weights by it."""
    seen = []

    class Watching(STUBS["brightness"]):
        def score(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return super().score(images, prompts)

    monkeypatch.setitem(STUBS, "brightness", Watching)
    for name in ("a", "b"):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    folders = {"model": (), "images": (f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"), "images_per_prompt": 1}
    assert run(plan_of(**folders), quiet).rewards[0].dtype == "fp32"
    half = plan_of(**folders, reward_dtype="bf16", out=tmp_path / "half")
    assert run(half, quiet).rewards[0].dtype == "bf16"
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.slow
def test_an_unfinished_run_is_continued(plan_of: EvaluationMaker, quiet: Console) -> None:
    evaluation = plan_of()
    first = run(evaluation, quiet)
    (evaluation.out / "results.json").unlink()
    evaluation.file("tuned", 1, 2).unlink()
    kept = evaluation.file("tuned", 1, 1)
    before = kept.stat().st_mtime_ns
    assert finished_results(evaluation, overwrite=False) is None
    assert run(evaluation, quiet) == first
    assert evaluation.file("tuned", 1, 2).is_file()
    assert kept.stat().st_mtime_ns == before


def test_the_models_are_in_half_precision_on_a_gpu_unless_asked_otherwise(plan_of: EvaluationMaker) -> None:
    for device, dtype, expected in (("cuda", None, "bf16"), ("cpu", None, "fp32"), ("cuda", "fp16", "fp16")):
        assert plan_of(device=device, dtype=dtype).settings.dtype == expected


def test_defaults_are_printed(plan_of: EvaluationMaker, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    (tmp_path / "twice.txt").write_text("a cat\na dog\na cat\ncat")
    run(plan_of(prompts=PromptSource(None, tmp_path / "twice.txt")), console)
    said = console.export_text()
    for part in ("device: cpu", "fp32", "3 images of 32 x 32 pixels", "batch size 4", "seed 0", "1 rows repeat"):
        assert part in said


def test_an_evaluation_of_an_earlier_version_is_finished(plan_of: EvaluationMaker, quiet: Console) -> None:
    """Its settings name no sampler, which was DDIM, and no dtype of rewards."""
    evaluation = plan_of()
    run(evaluation, quiet)
    file = evaluation.out / "results.json"
    written = json.loads(file.read_text())
    del written["settings"]["sampler"], written["settings"]["reward_dtype"]
    identity = {name: value for name, value in written["settings"].items() if value is not None}
    identity["models"] = [list(item) for item in identity["models"].items()]
    assert written["digest"] == sha256_json(identity)
    file.write_text(json.dumps(written))
    assert finished_results(plan_of(), overwrite=False)


@pytest.mark.slow
def test_other_settings_need_overwrite(plan_of: EvaluationMaker, quiet: Console) -> None:
    run(plan_of(), quiet)
    other = plan_of(steps=3)
    with pytest.raises(UserError, match="steps: 2 there, 3 here"):
        finished_results(other, overwrite=False)
    assert finished_results(other, overwrite=True) is None
    old = other.file("base", 0, 0).read_bytes()
    assert run(other, quiet).settings.steps == 3
    assert other.file("base", 0, 0).read_bytes() != old


@pytest.mark.slow
def test_another_reward_keeps_the_images(plan_of: EvaluationMaker, quiet: Console) -> None:
    run(plan_of(), quiet)
    other = plan_of(reward=["brightness", "redness"])
    before = other.file("base", 0, 0).stat().st_mtime_ns
    assert finished_results(other, overwrite=True) is None
    run(other, quiet)
    assert other.file("base", 0, 0).stat().st_mtime_ns == before


def test_replaced_weights_of_a_reward_are_another_evaluation(
    plan_of: EvaluationMaker, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"1")
    spec = f"brightness={weights}"
    monkeypatch.setitem(STUBS, spec, STUBS["brightness"])
    run(plan_of(reward=[spec]), quiet)
    assert finished_results(plan_of(reward=[spec]), overwrite=False)
    weights.write_bytes(b"2")
    with pytest.raises(UserError, match="--out .*other settings .rewards"):
        finished_results(plan_of(reward=[spec]), overwrite=False)


@pytest.mark.slow
def test_overwrite_scores_again_and_keeps_images(
    plan_of: EvaluationMaker, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a user's own reward, which no hash covers, may have changed."""
    first = run(plan_of(), quiet)
    evaluation = plan_of()
    before = evaluation.file("base", 0, 0).stat().st_mtime_ns
    monkeypatch.setitem(STUBS, "brightness", type("Other", (STUBS["redness"],), {"name": "brightness"}))
    assert finished_results(evaluation, overwrite=False) == first
    assert finished_results(evaluation, overwrite=True) is None
    assert run(evaluation, quiet).finding("base", "brightness") != first.finding("base", "brightness")
    assert evaluation.file("base", 0, 0).stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_reward_that_runs_out_of_memory_scores_smaller_batches(
    plan_of: EvaluationMaker, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(plan_of(), quiet)
    plain, at_once = STUBS["brightness"], []

    def score(reward: Reward, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if broken:
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
        at_once.append(len(images))
        return plain.score(reward, images, prompts)

    broken = False
    monkeypatch.setitem(STUBS, "brightness", type("Large", (plain,), {"score": score}))
    evaluation = plan_of()
    assert finished_results(evaluation, overwrite=True) is None
    assert run(evaluation, quiet).findings == whole.findings
    assert max(at_once) == 2
    broken = True
    with pytest.raises(UserError, match=r"--reward brightness: .*00000-0\d.png fails alone: RuntimeError: CUBLAS"):
        run(evaluation, quiet)


@pytest.mark.slow
def test_images_of_another_denoiser_under_the_same_name_are_not_kept(plan_of: EvaluationMaker, quiet: Console) -> None:
    """As if a hub id had another revision by now."""
    evaluation = plan_of()
    run(evaluation, quiet)
    (evaluation.out / "results.json").unlink()
    origin = evaluation.folder("tuned") / "made_from.json"
    origin.write_text(json.dumps(json.loads(origin.read_text()) | {"denoiser": "another"}))
    before = {name: evaluation.file(name, 0, 0).stat().st_mtime_ns for name in ("base", "tuned")}
    run(evaluation, quiet)
    after = {name: evaluation.file(name, 0, 0).stat().st_mtime_ns for name in ("base", "tuned")}
    assert after["base"] == before["base"]
    assert after["tuned"] > before["tuned"]


def test_a_later_models_mistake_is_found_before_anything_is_sampled(
    plan_of: EvaluationMaker, quiet: Console, models: dict[str, Path], tmp_path: Path
) -> None:
    larger = shutil.copytree(models["tuned"], tmp_path / "larger")
    config = larger / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    base = f"base={models['base']}"
    flow = shutil.copytree(models["base"], tmp_path / "flow")
    (flow / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    nine = shutil.copytree(models["base"], tmp_path / "nine")
    make_tiny_unet(in_channels=9).save_pretrained(nine / "unet")
    kohya = tmp_path / "kohya.safetensors"
    name = "lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)}, kohya)
    for changes, words in (
        ({"model": [base, f"flow={flow}"]}, "its scheduler, FlowMatchEulerDiscreteScheduler, has no beta schedule"),
        ({"model": [base, "tuned=runs/mistyped"]}, "--model tuned=runs/mistyped(: no such folder| cannot be loaded)"),
        ({"model": [base, f"tuned={larger}"]}, "latents differ in shape"),
        ({"model": [base, f"inpainting={nine}"]}, "its UNet takes 9 channels and gives 4"),
        ({"model": [base, f"kohya={kohya}"]}, "--model kohya=.*kohya.safetensors.*down_blocks.7"),
        ({"resolution": 20}, "--resolution 20"),
        ({"variant": "fp61"}, "--variant fp61"),
        ({"steps": 1001}, "--steps 1001: .* 1000 timesteps"),
    ):
        with pytest.raises(UserError, match=words):
            run(plan_of(**changes), quiet)
        assert not (tmp_path / "out" / "images").exists()


def test_swapped_models_are_another_evaluation(plan_of: EvaluationMaker, models: dict[str, Path]) -> None:
    specs = [f"base={models['base']}", f"tuned={models['tuned']}"]
    assert plan_of(model=specs).settings.digest() != plan_of(model=specs[::-1]).settings.digest()


def test_foreign_files_are_not_touched(plan_of: EvaluationMaker) -> None:
    evaluation = plan_of()
    evaluation.folder("base").mkdir(parents=True)
    (evaluation.folder("base") / "holiday.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not written by evaluate"):
        finished_results(evaluation, overwrite=True)


def test_a_score_that_is_not_finite_is_named(plan_of: EvaluationMaker, quiet: Console) -> None:
    with pytest.raises(UserError, match="no finite score"):
        run(plan_of(reward=["broken"]), quiet)


def test_headline_and_table(plan_of: EvaluationMaker) -> None:
    console = Console(record=True, width=100)
    results = run(plan_of(), Console(quiet=True))
    print_results(results, console)
    text = console.export_text()
    assert headline(results, "tuned", "brightness") in text
    assert re.search(
        r"tuned beats base in [\d.]+ % of 9 images of 3 prompts under brightness "
        r"\(95 % interval [\d.]+ \.\. [\d.]+ %, clustered by prompt",
        text,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "a={nothing}"], "is neither a folder"),
        (["--model", "a=owner/not-here"], "no such folder: owner/not-here; as a hub id it is not in the cache"),
        (["--model", "a={base}", "b={base}", "a={tuned}"], "--model a="),
        (["--model", "a={base}", "--reward", "nosuch"], "--reward nosuch"),
        (["--model", "a={base}", "--prompts", "{empty}"], "holds no prompt"),
        (["--model", "a={tuned}"], "--base"),
    ],
)
def test_wrong_use_is_one_line(
    models: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text("")
    names = {**models, "nothing": tmp_path / "nothing", "empty": tmp_path / "empty.txt"}
    given = [argument.format(**names) for argument in arguments]
    for flag, value in (("--prompts", str(prompts)), ("--reward", "toy-truth"), ("--out", str(tmp_path / "out"))):
        given += [] if flag in given else [flag, value]
    done = run_command("smpo-pipeline", "evaluate", *given)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
