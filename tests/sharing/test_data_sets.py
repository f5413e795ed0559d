"""``push`` of what the stages make: the files that belong to it, and a card; read back from the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import RepoCard

from smpo_common.store_path import parse_path
from smpo_schemas.manifest import read_manifest
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import assert_one_line, run_here
from tests.selection.helpers import PROMPTS, make_candidates
from tests.servers.hub_server import READER, Hub
from tests.tiny.stable_diffusion import make_tiny_model
from tests.trainer.helpers import make_shards, with_stored_text

LICENSE = ("--license", "cc-by-4.0")


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    return make_candidates(tmp_path_factory.mktemp("made"), PROMPTS)[1]


def push(capfd, *arguments):
    return run_here(capfd, "smpo-pipeline", "push", *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_with_stored_text_come_back_as_they_are(hub: Hub, tmp_path, capfd):
    model = make_tiny_model(tmp_path / "model")
    shards = with_stored_text(
        make_shards(tmp_path / "plain", model, num_pairs=5, num_states=1), model, tmp_path / "shards"
    )
    (shards / "config.yaml").write_text("out: /home/me/shards\n")  # this and the next are not of the data set
    (shards / ".lock").touch()
    done = push(capfd, shards, "owner/shards", *LICENSE)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/datasets/owner/shards" in done.stdout
    assert "(public)" in done.stdout
    there, here = contents(hub.folder("datasets/owner/shards")), contents(shards)
    card = RepoCard(there.pop("README.md").decode())
    assert there == {name: data for name, data in here.items() if name not in ("config.yaml", ".lock")}
    assert card.data.license == "cc-by-4.0"
    assert card.data.configs == [{"config_name": "default", "data_files": "shard-*.tar"}]
    assert card.data.size_categories == ["n<1K"]
    assert "smpo-train --shards hf://datasets/owner/shards --model model " in card.text
    assert str(tmp_path) not in card.text  # names of folders may say too much
    place = parse_path("hf://datasets/owner/shards")
    assert read_manifest(place) == read_manifest(shards)
    read = [sample.meta for sample in ShardDirectory(place).samples()]
    assert read == [sample.meta for sample in ShardDirectory(shards).samples()]


def test_scores_are_pushed_once_and_then_what_changed(hub: Hub, scores, tmp_path, capfd):
    folder = shutil.copytree(scores, tmp_path / "scores")
    assert push(capfd, folder, "scores", *LICENSE, "--hub-private-repo").returncode == 0  # the owner is the token's
    assert hub.private == {"datasets/owner/scores"}
    place = parse_path("hf://datasets/owner/scores")
    assert read_scores(place, read_scores_info(place)).equals(read_scores(folder, read_scores_info(folder)))
    assert len(hub.uploads) == 1
    assert push(capfd, folder, "owner/scores", "--license", "cc0-1.0").returncode == 0
    assert hub.uploads[1:] == [["README.md"]]


def test_a_selection_brings_its_scores_and_candidates_are_pairs(hub: Hub, tmp_path, capfd):
    candidates, scores = make_candidates(tmp_path, PROMPTS)
    given = ("--candidates", candidates, "--scores", scores, "--by", "extremes", "--out", tmp_path / "selected")
    assert run_here(capfd, "smpo-pipeline", "select", *given).returncode == 0
    assert push(capfd, tmp_path / "selected", "owner/selected", *LICENSE).returncode == 0
    there, here = contents(hub.folder("datasets/owner/selected")), contents(tmp_path / "selected")
    card = there.pop("README.md").decode()
    assert "--scores hf://datasets/owner/selected/scores" in card
    assert "| selected by | extremes |" in card
    assert there == {name: data for name, data in here.items() if name not in ("config.yaml", "run.json")}


def test_what_stops_a_push_is_one_line(hub: Hub, scores, tmp_path, capfd, monkeypatch):
    hub.make("datasets/other/open")
    hub.make("datasets/owner/open")
    for flags, *parts in [
        ((scores, "owner/x"), "--license", "cc-by-4.0", "not guessed"),
        ((scores, "a/b/c", *LICENSE), "a/b/c", "OWNER/NAME"),
        ((scores, "owner/so bad", *LICENSE), "owner/so bad", "OWNER/NAME"),
        ((scores, "owner/x", "--license", "not-a-license"), "owner/x", "license"),
        ((scores, "other/new", *LICENSE), "other/new", "may not write there"),
        ((scores, "owner/open", *LICENSE, "--hub-private-repo"), "owner/open", "is public"),
        ((scores, "owner/x", *LICENSE, "--evaluation", tmp_path), "--evaluation", "not a model"),
        ((tmp_path, "owner/x", *LICENSE), str(tmp_path), "manifest.json"),
        ((tmp_path / "nope", "owner/x", *LICENSE), "nope does not exist"),
    ]:
        assert_one_line(push(capfd, *flags), *parts)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert_one_line(push(capfd, scores, "owner/open", *LICENSE), "may not write there")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert_one_line(push(capfd, scores, "owner/x", *LICENSE), "does not know this token", "hf auth login")
    assert hub.uploads == []
    assert not hub.folder("datasets/owner/x").exists()


def test_a_card_of_the_users_own_is_pushed_as_it_is(hub: Hub, scores, tmp_path, capfd):
    folder = shutil.copytree(scores, tmp_path / "scores")
    (folder / "README.md").write_text("mine")
    assert_one_line(push(capfd, folder, "owner/x"), "README.md names no license")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert_one_line(push(capfd, folder, "owner/x", *LICENSE), "--license", "is your own")
    assert push(capfd, folder, "owner/x").returncode == 0
    assert contents(hub.folder("datasets/owner/x"))["README.md"] == b"---\nlicense: mit\n---\nmine"


def test_a_file_that_is_missing_is_named(hub: Hub, scores, tmp_path, capfd):
    folder = shutil.copytree(scores, tmp_path / "scores")
    part = read_scores_info(folder).parts[0].name
    (folder / part).unlink()
    assert_one_line(push(capfd, folder, "owner/x", *LICENSE), f"{folder} has no {part}")
