"""Every piece of Python in docs/guide/python.md runs as it stands, on tiny models where the demo leaves its own."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_trainer.objectives import find_objective
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model
from tests.trainer.conftest import Train
from tests.trainer.helpers import make_shards

GUIDE = (Path(__file__).parents[2] / "docs" / "guide" / "python.md").read_text(encoding="utf-8")
SNIPPETS = {
    section.partition("\n")[0]: code
    for section in GUIDE.split("\n## ")[1:]
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}
"""By the heading they stand under."""

PACKAGES = ("smpo_schemas", "smpo_models", "smpo_pipeline", "smpo_trainer")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, of tiny random models."""
    folder = tmp_path_factory.mktemp("guide")
    model = make_tiny_model(folder / "demo" / "world" / "model")
    for seed, name in enumerate(("pickscore", "clipscore")):
        make_tiny_clip(folder / "demo" / "world" / "rewards" / name, seed=seed)
    make_shards(folder / "demo" / "shards", model, rewards=("pickscore", "clipscore"))
    tuned = make_tiny_model(folder / "other", seed=1)
    shutil.copytree(tuned / "unet", folder / "demo" / "tuned" / "unet")
    return folder


def run(snippet: str, folder: Path) -> dict[str, object]:
    script = folder / "snippet.py"
    script.write_text(SNIPPETS[snippet], encoding="utf-8")
    return runpy.run_path(str(script))


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_runs(demo: Path, snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    run(snippet, demo)


def test_no_snippet_is_left_out() -> None:
    assert GUIDE.count("```python") == len(SNIPPETS) >= 8


@pytest.mark.slow
def test_what_the_snippets_make(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    made = run("Invert a few images", demo)
    assert made["sample"].timestep_K.shape == (9,)  # type: ignore[attr-defined]
    assert "noise ratio" in capsys.readouterr().out
    run("Sample as `evaluate` does", demo)
    assert (demo / "base.png").read_bytes() != (demo / "tuned.png").read_bytes()
    run("Train", demo)
    assert (demo / "demo" / "from-python" / "training.json").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_the_documented_ones(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == dir(module)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    (row,) = re.findall(rf"^\| `{package}` \| (.*) \|$", GUIDE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == set(module.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["smpo_schemas", "smpo_pipeline", "smpo_trainer"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; assert not {{'torch', 'diffusers', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def my_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's own objective, as a module beside which the command is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_objectives", raising=False)
    file = tmp_path / "my_objectives.py"
    file.write_text(SNIPPETS["Your own objective"], encoding="utf-8")
    yield file
    sys.modules.pop("my_objectives", None)


@pytest.mark.slow
def test_the_own_objective_trains_and_is_part_of_the_run(
    train: Train, my_objectives: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"objective": "my_objectives:Hinge", "objective_option": "enough=2", "beta": 300, "reward": None}
    out = train("own", max_steps=1, **options)
    assert '"objective": "hinge"' in (out / "training.json").read_text()
    train("own", max_steps=2, **options)  # the same code resumes
    my_objectives.write_text(my_objectives.read_text().replace("1 where", "2 where"))
    sys.modules.pop("my_objectives")
    capfd.readouterr()
    with pytest.raises(AssertionError):
        train("own", max_steps=3, **options)
    assert "objective's code" in capfd.readouterr().err


def test_the_own_objective_by_hand(my_objectives: Path) -> None:
    import torch

    from smpo_trainer import PairBatch

    kind = find_objective("my_objectives:Hinge")
    objective = kind(kind.Options.parse("hinge", {"enough": "2"}, beta=10))
    batch = PairBatch(
        error_B2=torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.0, 1.0]]),
        ref_error_B2=torch.full((3, 2), 0.5),
        preference_B=torch.zeros(3),
        label_B=torch.tensor([1.0, 0.0, 1.0]),
        timestep_B=torch.zeros(3, dtype=torch.int64),
    )
    # h = -(10 / 2) (-0.2) = 1, 1 and 5: 2 - 1, 2 + 1 and max(0, 2 - 5)
    torch.testing.assert_close(objective.loss(batch), torch.tensor([1.0, 3.0, 0.0]))
    with pytest.raises(UserError, match="--objective-option enough=0"):
        kind.Options.parse("hinge", {"enough": "0"}, beta=10)
