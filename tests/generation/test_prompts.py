from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.generation.prompts import PromptRow, read_prompt_file, read_prompts


def test_distinct_prompts_and_rows_without_a_usable_one(tmp_path: Path) -> None:
    prompts = ["a cat", None, " a cat", "a dog", "x" * 100_001]
    pq.write_table(pa.table({"n": range(5), "prompt": prompts, "image": [b"x"] * 5}), tmp_path / "a.parquet")
    file = read_prompt_file(tmp_path / "a.parquet")
    assert [(row.row, row.prompt and row.prompt[:5]) for row in file.rows] == [
        (0, "a cat"),
        (1, None),
        (3, "a dog"),
        (4, None),
    ]
    assert [str(row.reason).partition(":")[0] for row in file.rows] == ["None", "no prompt", "None", "text too long"]
    assert file.columns.to_pydict() == {"n": [0, 1, 3, 4]}
    assert len(read_prompt_file(tmp_path / "a.parquet", limit=2).rows) == 2


def test_columns_of_lines_that_lack_some(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "n": 1}, {"prompt": "b", "tags": ["x"]}, {"prompt": 3}, {"prompt": "c", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = read_prompt_file(tmp_path / "a.jsonl")
    assert file.rows[2] == PromptRow(2, None, "not text: 3")
    assert file.columns.to_pydict() == {"n": [1, None, None, 2], "tags": [None, ["x"], None, None]}
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}')
    with pytest.raises(UserError, match="--prompts .*b.jsonl: the values of 'n'"):
        read_prompt_file(tmp_path / "b.jsonl")


def test_lines_of_text_without_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\na\n\n b \n")
    assert read_prompt_file(tmp_path / "a.txt").rows == [PromptRow(1, "a"), PromptRow(3, "b")]


def test_prompts_of_every_kind_of_file(tmp_path: Path) -> None:
    wanted = ["a cat", "ein Bär"]
    (tmp_path / "a.txt").write_text("a cat\n\n  ein Bär \na cat\n", encoding="utf-8")
    rows = [{"prompt": prompt} for prompt in ("a cat", "", None, "ein Bär")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    pq.write_table(pa.table({"caption": ["a cat", "a cat", None, "ein Bär"]}), tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        assert read_prompts(tmp_path / f"a.{kind}").texts == wanted
    assert read_prompts(tmp_path / "a.txt", limit=1).texts == ["a cat"]
    (tmp_path / "odd.txt").write_bytes("a\u2028cat\r\na\x85dog\r\n".encode())
    assert read_prompts(tmp_path / "odd.txt").texts == ["a\u2028cat", "a\x85dog"]
    pq.write_table(pa.table({"prompt": [b"a cat"]}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match="--prompts .*b'a cat'"):
        read_prompts(tmp_path / "bytes.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "--prompts .*not a file"),
        ("empty.txt", "\n \n", "holds no prompt"),
        ("odd.doc", "a", r"--prompts .*\.txt"),
        ("odd.csv", "a\nb", "no column prompt"),
        ("open.csv", 'prompt\n"a', "cannot be read"),
        ("wide.tsv", "prompt\tcategory\na\tb\tc", "row 2 has 3 cells"),
        ("number.json", "3", "expected a JSON list"),
        ("uneven.json", '{"prompt": ["a"], "category": []}', "differ in length"),
        ("bad.jsonl", '{"prompt": ', "cannot be read"),
        ("list.jsonl", "[1]", "line 1"),
        ("other.jsonl", '{"text": "a"}', "no column prompt, prompts or caption"),
        ("bad.parquet", "no parquet", "cannot be read"),
        ("number.jsonl", '{"prompt": 3}', "--prompts .*: 3"),
        ("two.jsonl", '{"prompt": ["a", "b"]}', r"--prompts .*\['a', 'b'\]"),
        ("half.jsonl", '{"prompt": "\\ud83d"}', "not Unicode"),
        ("deep.jsonl", '{"prompt": ' + "[" * 100_000, "cannot be read"),
    ],
)
def test_unusable_prompt_files(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


CATEGORISED = ["a cat, sitting", "a dog"], ["Animals", "Animals & more"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufeffPrompts,Category\r\n"a cat, sitting",Animals\r\n\r\na dog,Animals & more\r\n'),
        ("a.tsv", "Note\tPrompt\tCategory\n\ta cat, sitting\tAnimals\n\ta dog\t Animals & more \n"),
        ("a.json", '{"Animals": ["a cat, sitting"], "Animals & more": [{"prompt": "a dog"}, "a dog"]}'),
        ("b.json", '{"prompt": ["a cat, sitting", "a dog"], "category": ["Animals", "Animals & more"]}'),
        ("a.jsonl", '{"prompt": "a cat, sitting", "tag": "Animals"}\n{"prompt": "a dog", "tag": "Animals & more"}'),
    ],
)
def test_categories_of_every_kind_of_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    prompts = read_prompts(tmp_path / name)
    assert (prompts.texts, prompts.categories) == CATEGORISED
    assert prompts.first(1).categories == ["Animals"]


def test_another_column_of_categories(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "category": "x", "level": 2}, {"prompt": "b", "category": None, "level": None}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    assert read_prompts(path).categories == ["x", ""]
    assert read_prompts(path, category_column="level").categories == ["2", ""]
    with pytest.raises(UserError, match=r"--category-column lvl: .*a.json has no such column .*category, level"):
        read_prompts(path, category_column="lvl")
    path.write_text(json.dumps([{"prompt": "a", "category": ["x", "y"]}]))
    with pytest.raises(UserError, match="holds no categories"):
        read_prompts(path)


def test_quotes_in_tab_separated_prompts_are_text(tmp_path: Path) -> None:
    """Spreadsheets write no quoting there: a prompt may begin with a quote that ends within it, or nowhere."""
    path = tmp_path / "a.tsv"
    for first in ('"Fly" on a wall', '"Fly on a wall', 'a sign, "Fly"'):
        path.write_text(f"Prompt\tCategory\n{first}\tArts\na dog\tAnimals\n")
        assert read_prompts(path).texts == [first, "a dog"]
    path.write_text('Prompt\tCategory\n"the word ""Fly"""\tArts\n')
    assert read_prompts(path).texts == ['the word "Fly"']


def test_objects_are_carried_as_text(tmp_path: Path) -> None:
    """Empty ones cannot be written to Parquet, and keys that an object lacks would appear in it."""
    rows = [{"prompt": "a", "metadata": {}, "at": ["left of", 0]}, {"prompt": "b", "metadata": {"ä": 1}, "at": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    columns = read_prompt_file(tmp_path / "a.json").columns
    assert columns.to_pydict() == {"metadata": ["{}", '{"ä": 1}'], "at": ['["left of", 0]', None]}
    pq.write_table(columns, tmp_path / "b.parquet")


def test_numbers_of_classes_become_their_names(tmp_path: Path) -> None:
    """Of Parquet files that the library datasets wrote, such as the hub's copies of DrawBench."""
    features = {"category": {"names": ["Colors", "Counting"], "_type": "ClassLabel"}, "prompts": {"dtype": "string"}}
    table = pa.table({"prompts": ["a", "b", "c"], "category": pa.array([1, 0, -1], pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet").categories == ["Counting", "Colors", ""]
