from __future__ import annotations

from types import SimpleNamespace

import pytest

from smpo_pipeline.inspection.shards import describe_settings
from smpo_pipeline.inversion.advice import health_warnings, sampling_remarks
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import BandHealth, ImageSampling


def band(ratio: float | None, start: int = 0) -> BandHealth:
    return BandHealth(
        start=start, stop=start + 200, states=8, noise_ratio=ratio, residual=None, neighbour_correlation=None
    )


DEFAULT = InversionSettings()


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25, None])
def test_good_bands_give_no_warning(ratio: float | None) -> None:
    assert health_warnings([band(ratio)], DEFAULT) == []


@pytest.mark.parametrize(
    ("ratio", "settings", "expected", "absent"),
    [
        (0.79, {}, ["more ReNoise steps (--renoise-steps 5)", "--start level0", "--start T (", "VAE"], ["--steps"]),
        (0.2, {"solver": "ddim"}, ["--solver renoise --renoise-steps 5", "--start level0", "--start T ("], ["--steps"]),
        (0.79, {"renoise_steps": 5}, ["--start level0", "--start T ("], ["--renoise-steps", "--steps"]),
        (0.79, {"solver": "anderson"}, ["--start level0", "--start T ("], ["--renoise-steps", "--solver", "--steps"]),
        (0.79, {"start": "level0"}, ["--renoise-steps 5", "--start T ("], ["--start level0"]),
        (0.79, {"start": 100, "solver": "adaptive"}, ["--start T further on", "VAE"], ["--start level0", "ReNoise"]),
        (1.26, {}, ["more --steps", "--start T", "More corrections a step raise it"], ["ReNoise", "level0"]),
        (5.0, {"solver": "anderson"}, ["more --steps", "--start T"], ["ReNoise", "level0"]),
        (0.7, {"source": "tracked"}, ["--source sampled", "--guidance-scale 1", "--source renoise"], ["--start"]),
        (1.3, {"source": "sampled"}, ["--guidance-scale 1", "--source renoise"], ["--start", "--source sampled"]),
    ],
)
def test_bad_bands_are_named_and_remedies_follow_by_side_and_solver(
    ratio: float, settings: dict[str, object], expected: list[str], absent: list[str]
) -> None:
    first, remedies = health_warnings([band(1.0), band(ratio, start=200)], InversionSettings(**settings))
    assert "200 to 399" in first
    assert f"{ratio:.2f}" in first
    places = [remedies.index(word) for word in expected]
    assert places == sorted(places)
    assert not any(word in remedies for word in absent)


def test_remedies_are_named_once_per_side() -> None:
    assert len(health_warnings([band(0.5), band(0.5, 200), band(0.6, 400)], DEFAULT)) == 4
    *_, low, high = health_warnings([band(0.5), band(2.0, 200), band(0.5, 400)], DEFAULT)
    assert "low ratio" in low
    assert "high ratio" in high


def test_published_timesteps_are_named_before_the_remedies() -> None:
    _, named, low = health_warnings([band(0.5)], InversionSettings(timesteps="published"))
    assert "--timesteps jittered" in named
    assert "--renoise-steps" in low
    assert health_warnings([band(1.0)], InversionSettings(timesteps="published")) == []


@pytest.mark.parametrize(("residual", "settings", "warned"), [
    (0.1, {"solver": "ddim", "steps": 5}, False),  # the worst band on the embedded worlds
    (0.3, {}, True),
    (0.3, {"solver": "anderson", "guidance_scale": 3}, True),
    (0.3, {"eta": 1}, False),  # what eta adds is no error of the solver
])  # fmt: skip
def test_steps_that_were_not_solved_are_named(residual: float, settings: dict[str, object], warned: bool) -> None:
    bands = [band(1.0), band(1.0, 200).model_copy(update={"residual": residual})]
    chosen = InversionSettings(**settings)
    warnings = health_warnings(bands, chosen)
    assert len(warnings) == 2 * warned
    if warned:
        assert "200 to 399: residual 0.30" in warnings[0]
        assert ("--solver anderson" in warnings[1]) == (chosen.solver != "anderson")
        assert ("--guidance-scale" in warnings[1]) == (chosen.guidance_scale > 1)


@pytest.mark.parametrize(("unconverged", "warned"), [(0, False), (5, False), (6, True)])
def test_solvers_that_failed_often_are_named(unconverged: int, warned: bool) -> None:
    warnings = health_warnings([band(1.0).model_copy(update={"solved": 100, "unconverged": unconverged})], DEFAULT)
    assert len(warnings) == warned
    assert all(f"0 to 199: {unconverged} of 100" in line and "--solver anderson" in line for line in warnings)


def test_a_solver_that_failed_is_not_recommended() -> None:
    failed = [band(1.0).model_copy(update={"solved": 100, "unconverged": 50})]
    (line,) = health_warnings(failed, InversionSettings(solver="anderson", dtype="fp16"))
    assert line.endswith("Remedies: more --steps, a wider --dtype.")
    (line,) = health_warnings(failed, InversionSettings(solver="adaptive"))
    assert line.endswith("Remedies: --solver anderson, more --steps.")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "1 ReNoise iterations each"),
        ({"renoise_steps": 5, "renoise_average": "3,5"}, "5 ReNoise iterations each, mean of estimates 3,5"),
        ({"solver": "ddim"}, "DDIM inversion without correction"),
        ({"source": "tracked", "steps": 3}, "each image's own initial noise at 3 jittered timesteps; all"),
        ({"source": "sampled", "steps": 2}, "up to 2 of the sampler's own states; all"),
        ({"solver": "adaptive"}, "each solved by adaptive iteration to residual 0.0001 or 30 evaluations"),
        (
            {"solver": "anderson", "tolerance": 1e-5},
            "each solved by anderson iteration of depth 3 to residual 1e-05 or 30 eval",
        ),
    ],
)
def test_solvers_are_described(settings: dict[str, object], words: str) -> None:
    assert words in describe_settings(InversionSettings(**settings))


@pytest.mark.parametrize(
    ("source", "kind", "told", "scale", "words"),
    [
        ("tracked", "flow", None, 1.0, []),
        ("tracked", "flow", None, 4.5, ["guidance scale 4.5, so their states lie off the path"]),
        ("sampled", "flow", 1.0, 3.5, ["told guidance scale 3.5", "told 1 (--embedded-guidance)"]),
        ("sampled", "flow", 3.5, 3.5, []),
        ("sampled", "epsilon", None, 1.0, []),
        ("tracked", "epsilon", None, 1.0, ["--source tracked approximates", "--source sampled"]),
        ("tracked", "flow", None, None, []),
    ],
)
def test_sampling_that_leaves_the_measured_path_is_remarked(
    source: str, kind: str, told: float | None, scale: float | None, words: list[str]
) -> None:
    sampling = ImageSampling(
        candidates_sha256="",
        denoiser="",
        negative=None,
        sampler="Euler",
        steps=4,
        guidance_scale=scale,
        seed=0,
        dtype="fp32",
    )
    manifest = SimpleNamespace(
        model=SimpleNamespace(embedded_guidance=told, prediction_type=kind),
        inversion=InversionSettings(source=source),
        samplings=[sampling, sampling],
    )
    remarks = sampling_remarks(manifest)
    assert len(remarks) == bool(words)
    assert all(word in remarks[0] for word in words)
