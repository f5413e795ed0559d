"""The flags of ``invert`` that only some flow models know."""

from __future__ import annotations

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_pipeline.jobs.invert.models import describe_model, load_models, read_configs
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_schemas.inversion_settings import InversionSettings
from tests.tiny.flow import make_tiny_flux
from tests.tiny.stable_diffusion import make_tiny_model


def options_of(model, **trajectory) -> InvertOptions:
    return InvertOptions(
        pairs=[],
        scores=model,
        out=model,
        models={"model": str(model)},
        trajectory=trajectory,
        running={"device": "cpu"},
    )


def test_another_number_of_sampler_steps_gives_other_nodes(tmp_path):
    model = make_tiny_flux(tmp_path, shift_terminal=0.02)
    nodes = {}
    for steps in (None, 28, 10):
        family, denoiser = load_models(options_of(model, sampler_steps=steps))
        info = describe_model(options_of(model, sampler_steps=steps), family, denoiser).info()
        assert info.sampler_steps == (steps or 28)
        nodes[steps] = plan_trajectory(InversionSettings(steps=4), family.noise_schedule, 0, "a", 0, tokens=64).used_at
    assert nodes[None] == nodes[28]
    assert all(few != many for few, many in zip(nodes[10], nodes[28], strict=True))


def test_the_guidance_that_the_model_is_told_is_in_the_manifest(tmp_path):
    model = make_tiny_flux(tmp_path)
    for given, told in ((None, 1.0), (3.5, 3.5)):
        options = options_of(model, embedded_guidance=given)
        loaded = load_models(options)
        assert loaded[0].embedded_guidance == told
        assert describe_model(options, *loaded).info().embedded_guidance == told


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (make_tiny_model, {"embedded_guidance": 3.5}),
        (make_tiny_model, {"sampler_steps": 28}),
        (lambda path: make_tiny_flux(path, guided=False), {"embedded_guidance": 3.5}),
        (make_tiny_flux, {"sampler_steps": 28}),
    ],
)
def test_what_a_model_does_not_know_is_refused_by_its_configs(tmp_path, make, flags):
    model = make(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    ((name, value),) = flags.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}.*leave it out"):
        read_configs(options_of(model, **flags))
