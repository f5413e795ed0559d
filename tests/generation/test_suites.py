"""Published suites of prompts, each from a small file in its own layout."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.generation import suites
from smpo_pipeline.generation.suites import SUITES, PromptSource

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cow",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]


def write_hpsv2(folder: Path) -> None:
    """Write lists of strings by style; DrawBench lies beside them, and a prompt is in two styles."""
    prompts = {
        "anime": ["a girl", "a cat"],
        "concept-art": ["a castle"],
        "paintings": ["a cat", "a sea"],
        "photo": ["x"],
    }
    for style, texts in {**prompts, "drawbench": ["a red car"]}.items():
        (folder / f"{style}.json").write_text(json.dumps(texts))


def write_parti(folder: Path) -> None:
    rows = ["Prompt\tCategory\tChallenge\tNote", "42\tAbstract\tBasic\tSimple numbers", "a cat\tAnimals\tBasic\t"]
    rows += ['The words "Fly an airplane" are written. \tOutdoor Scenes\tComplex\t', "a cat\tArtifacts\tBasic\t"]
    (folder / "PartiPrompts.tsv").write_text("\n".join(rows) + "\n")


def write_papv2(folder: Path) -> None:
    """Write pairs without images; the whole test split lies beside the one with each prompt once."""
    table = pa.table({"caption": ["a cat", "a dog"], "label_0": [1.0, 0.5], "user_id": [1, 2]})
    pq.write_table(table, folder / "test_unique-00000-of-00001-e852c19ead276a89.parquet")
    pq.write_table(pa.table({"caption": ["another"]}), folder / "test-00000-of-00001-7e933a600b5af2c0.parquet")


def write_drawbench(folder: Path) -> None:
    table = pa.table({"prompts": ["A red colored car.", "One cat."], "category": ["Colors", "Counting"]})
    pq.write_table(table, folder / "test-00000-of-00001.parquet")


def write_geneval(folder: Path) -> None:
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))


EXPECTED = {
    "hpsv2": (
        ["a girl", "a cat", "a castle", "a sea", "x"],
        ["anime", "anime", "concept-art", "paintings", "photo"],
        1,
    ),
    "parti": (
        ["42", "a cat", 'The words "Fly an airplane" are written.'],
        ["Abstract", "Animals", "Outdoor Scenes"],
        1,
    ),
    "papv2": (["a cat", "a dog"], None, 0),
    "drawbench": (["A red colored car.", "One cat."], ["Colors", "Counting"], 0),
    "geneval": ([row["prompt"] for row in GENEVAL], ["single_object", "position", "counting"], 0),
}
WRITERS = {
    "hpsv2": write_hpsv2,
    "parti": write_parti,
    "papv2": write_papv2,
    "drawbench": write_drawbench,
    "geneval": write_geneval,
}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_from_its_folder_or_file(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    source = PromptSource.parse(f"{name}={tmp_path}")
    prompts = source.read()
    assert (prompts.texts, prompts.categories, prompts.repeated) == EXPECTED[name]
    assert str(source) == f"{name}={tmp_path}"
    if len(source.files()) == 1:
        assert PromptSource.parse(f"{name}={source.files()[0]}").read() == prompts


def test_a_suite_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder there is read as one here."""
    write_hpsv2(tmp_path)
    monkeypatch.setattr(suites.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(suites, "StorePath", lambda url: tmp_path if url.endswith("zhwang/HPDv2/benchmark") else None)
    assert PromptSource.parse("hpsv2").read(3).categories == ["anime", "anime", "concept-art"]


def test_other_files_of_the_same_prompts(tmp_path: Path) -> None:
    """Diffusion-SDPO's lists, and the table that DrawBench was first published as."""
    (tmp_path / "papv2.json").write_text(json.dumps([{"prompt": "a cat", "gen_image_path": "", "metadata": {}}]))
    assert PromptSource.parse(f"papv2={tmp_path / 'papv2.json'}").read().texts == ["a cat"]
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"A bird, and a ""sign"".",Text\nOne cat.,Counting \n')
    prompts = PromptSource.parse(f"drawbench={tmp_path / 'drawbench.csv'}").read()
    assert (prompts.texts, prompts.categories) == (['A bird, and a "sign".', "One cat."], ["Text", "Counting"])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    write_hpsv2(tmp_path)
    (tmp_path / "photo.json").unlink()
    for given, words in (
        (f"hpsv2={tmp_path}", "no file matches photo.json in .*zhwang/HPDv2"),
        ("parti", "HF_HUB_OFFLINE=1; give its file or folder.*--prompts parti=PATH"),
        ("geneval", "not read from the hub; .*djghosh13/geneval"),
        ("geneval=nothing.jsonl", "--prompts geneval=nothing.jsonl: nothing.jsonl does not exist"),
        ("prati", "no such file; published suites: hpsv2, parti"),
        ("nothing.txt", "nothing.txt does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            PromptSource.parse(given).read()
    (tmp_path / "parti").write_text("a cat")
    assert PromptSource.parse("parti").suite is None
