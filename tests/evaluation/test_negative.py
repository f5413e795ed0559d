"""``--negative``: another model predicts for the unconditional prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.evaluation import finished_results
from tests.evaluation.stubs import EvaluationMaker, run
from tests.tiny.flow import make_tiny_flux
from tests.tiny.stable_diffusion import make_tiny_model

GUIDED = {"images_per_prompt": 2, "guidance_scale": 3.0}


def images(evaluation, model: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(evaluation.folder(model).glob("*.png"))]


@pytest.mark.slow
@pytest.mark.usefixtures("stub_rewards")
def test_a_negative_model_changes_the_images_of_its_model_alone(
    plan_of: EvaluationMaker, models: dict[str, Path], tmp_path: Path
) -> None:
    quiet, base, tuned = Console(quiet=True), models["base"], models["tuned"]
    plain = plan_of(**GUIDED, out=tmp_path / "plain")
    run(plain, quiet)
    # Of the base guided by itself, to the bit; tuned away from the base.
    negative = {"negative": (f"base={base}", f"tuned={base}")}
    guided = plan_of(**GUIDED, out=tmp_path / "guided", **negative)
    results = run(guided, quiet)
    assert images(guided, "base") == images(plain, "base")
    assert not set(images(guided, "tuned")) & set(images(plain, "tuned"))
    assert [entry.negative for entry in results.models] == [str(base)] * 2
    assert results.models[1].denoiser == run(plain, quiet).models[1].denoiser
    assert str(base) in (tmp_path / "guided" / "report.html").read_text().split("guided away from")[1][:200]
    # Other weights of the negative model are another evaluation.
    assert finished_results(guided, overwrite=False) == results
    other = plan_of(**GUIDED, out=tmp_path / "guided", negative=(f"base={base}", f"tuned={tuned}"))
    assert other.settings.digest() != guided.settings.digest()


@pytest.mark.usefixtures("stub_rewards")
def test_a_whole_model_is_guided_away_from_a_trained_one(
    plan_of: EvaluationMaker, models: dict[str, Path], tmp_path: Path
) -> None:
    base, tuned = models["base"], models["tuned"]
    few = {"images_per_prompt": 1, "guidance_scale": 3.0, "model": (f"base={base}", f"guided={base}")}
    guided = plan_of(**few, out=tmp_path / "guided", negative=(f"guided={tuned}",))
    results = run(guided, Console(quiet=True))
    assert [(entry.base, entry.negative) for entry in results.models] == [(None, None), (None, str(tuned))]
    assert not set(images(guided, "guided")) & set(images(guided, "base"))


@pytest.mark.usefixtures("stub_rewards")
def test_wrong_negatives_are_one_line(plan_of: EvaluationMaker, models: dict[str, Path], tmp_path: Path) -> None:
    flux = make_tiny_flux(tmp_path / "flux")
    other = make_tiny_model(tmp_path / "other", text_width=16)
    for changes, message in (
        ({"negative": ("base=./nothing",)}, r"--negative base=./nothing: no such folder: ./nothing"),
        (
            {"negative": (f"third={models['base']}",)},
            r"--negative third=.*no --model has this name; known: base, tuned",
        ),
        ({"negative": (f"base={models['base']}",)}, r"--negative: at --guidance-scale 1 nothing is predicted"),
        (
            {"model": (f"flux={flux}",), "negative": (f"flux={flux}",), **GUIDED},
            r"--negative flux=.*without an unconditional prediction",
        ),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(**changes)
    evaluation = plan_of(**GUIDED, negative=(f"base={other}",))
    with pytest.raises(UserError, match=rf"--negative base={other} has .* one architecture"):
        run(evaluation, Console(quiet=True))
