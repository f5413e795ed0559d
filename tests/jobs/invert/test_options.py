"""The flags of ``invert``, parsed and validated."""

from __future__ import annotations

import pytest
import yaml

from smpo_common.errors import UserError
from smpo_common.options import fields_of
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_schemas.inversion_settings import InversionSettings


@pytest.fixture
def parse(tmp_path):
    """Parse flags, as typed on the command line or all from a config file."""

    def parse(*, typed_flags=True, **flags):
        needed = {"pairs": [str(tmp_path)], "scores": str(tmp_path), "model": str(tmp_path), "out": str(tmp_path)}
        typed = {name: None for name, *_ in fields_of(InvertOptions)} | needed | flags
        return InvertOptions.parse(typed, frozenset(flags if typed_flags else ()))

    return parse


def test_without_flags_the_settings_are_the_defaults(parse):
    assert parse(device="cpu").settings == InversionSettings()


@pytest.mark.parametrize(
    ("flags", "dtype", "tolerance"),
    [
        ({"device": "cpu"}, "fp32", 1e-4),
        ({"device": "cuda"}, "bf16", 2e-3),
        ({"device": "cuda", "dtype": "fp16"}, "fp16", 3e-4),
        ({"device": "cpu", "dtype": "bf16"}, "bf16", 2e-3),
        ({"device": "cuda", "tolerance": 0.5, "solver": "adaptive"}, "bf16", 0.5),
    ],
)
def test_the_dtype_follows_the_device_and_the_tolerance_the_dtype(parse, flags, dtype, tolerance):
    settings = parse(**flags).settings
    assert (settings.dtype, settings.tolerance) == (dtype, tolerance)


def test_every_setting_has_its_flag(parse):
    """Each setting gets a value that is not its default."""
    flags = {
        "source": "forward", "forward_noise": "image", "timesteps": "grid", "steps": 3, "states": "2",
        "trajectories": 2, "vae_latent": "mode", "prompt_dropout": 0.5, "empty_prompt": "encoded", "hflip": False,
        "size_conditioning": "constant", "storage": "bfloat16", "text": "stored", "buckets": True, "dtype": "fp16",
    }  # fmt: skip
    path = {
        "start": "level0", "solver": "anderson", "tolerance": 0.5, "max_evaluations": 7, "anderson_depth": 2,
        "eta": 0.1, "guidance_scale": 2.0,
    }  # fmt: skip
    renoise = {"renoise_steps": 2, "renoise_average": "all", "start": "500"}
    truncated = {"source": "truncated", "truncated_steps": 3, "truncated_from": "noise"}
    for typed in (flags, path, renoise, truncated):
        settings = parse(device="cpu", **typed).settings.model_dump()
        expected = typed | ({"states": 2} if "states" in typed else {}) | ({"start": 500} if typed is renoise else {})
        assert {name: settings[name] for name in typed} == expected
    assert {*flags, *path, *renoise, *truncated} == set(InversionSettings.model_fields)


def test_a_written_config_reproduces_sizes_and_the_word_auto(parse, tmp_path):
    flags = {"batch_size": "auto", "shard_size": "500MB", "states": "3", "start": "7", "device": "cpu"}
    options = parse(**flags)
    options.write(tmp_path)
    again = parse(typed_flags=False, **yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert again.flat_values() == options.flat_values()
    assert (again.running.batch_size, again.storing.shard_size, again.storing.states) == (None, 500_000_000, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "forward", "eta": 0.1}, "--eta: --source forward .*--source renoise"),
        ({"source": "forward", "solver": "ddim"}, "--solver: --source forward "),
        ({"forward_noise": "image"}, "--forward-noise: --source renoise .*--source forward"),
        ({"source": "tracked", "solver": "ddim"}, "--solver: --source tracked "),
        ({"source": "sampled", "timesteps": "grid"}, "--timesteps: --source sampled .*--source renoise, forward, tr"),
        ({"solver": "renoise", "tolerance": 0.1}, "--tolerance: --solver renoise .*--solver adaptive, anderson"),
        ({"renoise_average": "3"}, "--renoise-average 3: .*0 to 1"),
        ({"start": "middle"}, "--start middle"),
        ({"states": "0"}, "--states 0"),
        ({"source": "truncated", "states": "all"}, "--states all: .* give a number"),
        ({"source": "truncated", "timesteps": "grid"}, "--timesteps: --source truncated "),
        ({"truncated_steps": 3}, "--truncated-steps: --source renoise .*--source truncated"),
    ],
)
def test_flags_without_effect_are_refused(parse, flags, message):
    with pytest.raises(UserError, match=message):
        parse(**flags)


def test_truncated_sampling_has_defaults_of_its_own(parse):
    settings = parse(source="truncated", device="cpu").settings
    assert (settings.steps, settings.truncated_steps, settings.states, settings.guidance_scale) == (25, 5, 9, 0)
    assert settings.timesteps == "grid"
    settings = parse(source="truncated", steps=10, states="2", guidance_scale=1.0, device="cpu").settings
    assert (settings.steps, settings.states, settings.guidance_scale) == (10, 2, 1)


def test_generated_images_are_not_mirrored(parse):
    """Nor refused where a switch asks for just that."""
    options = parse(source="sampled", hflip=False, buckets=False, device="cpu")
    assert (options.settings.hflip, options.settings.timesteps) == (False, "grid")
    assert not parse(source="tracked", device="cpu").settings.hflip
    assert parse(source="tracked", device="cpu").settings.timesteps == "jittered"


def test_a_config_may_have_flags_that_the_solver_does_not_use(parse):
    assert parse(typed_flags=False, solver="ddim", renoise_steps=5, tolerance=0.1).solving.solver == "ddim"
