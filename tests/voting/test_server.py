"""The server: what annotators are shown and what is written."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flask.testing import FlaskClient

from smpo_common.errors import UserError
from smpo_pipeline.voting.ballot import Ballot
from smpo_pipeline.voting.server import make_app
from smpo_pipeline.voting.votes import Votes
from smpo_schemas.label_file import PairVotes, read_labels, with_labels
from tests.command import assert_one_line, run_here
from tests.voting.helpers import BROKEN, COUNT, is_red, read, rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.parquet"


def client(ballot: Ballot, path: Path, votes_per_pair: int | None = None) -> FlaskClient:
    app = make_app(ballot, Votes(path), votes_per_pair=votes_per_pair, hosts=("127.0.0.1", "localhost"))
    return app.test_client()


def state(of: FlaskClient, annotator: str) -> dict:
    return of.get("/api/next", query_string={"annotator": annotator}).json


def vote(of: FlaskClient, pair: str, choice: str, annotator: str = "ann") -> dict:
    answer = of.post("/api/vote", json={"annotator": annotator, "pair": pair, "choice": choice})
    assert answer.status_code == 200, answer.json
    return answer.json


def picture(of: FlaskClient, pair: str, side: str, annotator: str = "ann") -> bytes:
    return of.get("/picture", query_string={"pair": pair, "side": side, "annotator": annotator}).data


def vote_on_all(of: FlaskClient, annotator: str, colour_is_red: bool) -> int:
    """Vote for one colour, as seen in the pictures, until nothing is left."""
    count, shown = 0, state(of, annotator)["pair"]
    while shown:
        red_is_left = is_red(picture(of, shown["id"], "left", annotator))
        assert red_is_left != is_red(picture(of, shown["id"], "right", annotator))
        shown = vote(of, shown["id"], "left" if red_is_left == colour_is_red else "right", annotator)["pair"]
        count += 1
    return count


def test_a_label_is_of_the_image_that_was_seen_on_either_side(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path)
    assert vote_on_all(server, "ann", colour_is_red=True) == COUNT - 1
    assert vote_on_all(server, "ben", colour_is_red=False) == COUNT - 1
    written = rows(path)
    assert [row["pair_id"] for row in written[: COUNT - 1]] == [name for name in ballot.pairs if name != broken()]
    assert {(row["annotator"], row["label"]) for row in written} == {("ann", 1.0), ("ben", 0.0)}
    assert len(written) == 2 * (COUNT - 1)
    sides = {(name, who): ballot.image_on("left", name, who) for name in ballot.pairs for who in ("ann", "ben")}
    assert {sides[name, "ann"] for name in ballot.pairs} == {0, 1}  # blind: no side names an image
    assert any(sides[name, "ann"] != sides[name, "ben"] for name in ballot.pairs)
    assert state(server, "ben")["agreement"] == {"votes": COUNT - 1, "equal": 0}


def broken() -> str:
    return f"pair {BROKEN}/a"


def test_what_cannot_be_shown_is_left_out_with_a_reason(ballot: Ballot, path: Path) -> None:
    vote_on_all(client(ballot, path), "ann", colour_is_red=True)
    assert set(ballot.left_out) == {broken(), next(place for place in ballot.left_out if place.endswith(f":{COUNT}"))}
    assert "image not readable" in ballot.left_out[broken()]
    assert state(client(ballot, path), "ann") | {"agreement": None} == {
        "pair": None,
        "then": None,
        "done": COUNT - 1,
        "total": COUNT - 1,
        "left_out": 2,
        "agreement": None,
    }


def test_undo_takes_back_the_own_latest_vote_and_a_new_one_replaces_it(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path)
    first, second, *_ = ballot.pairs
    vote(server, first, "tie")
    vote(server, second, "left")
    vote(server, first, "right", "ben")
    assert server.post("/api/undo", json={"annotator": "ann"}).json["pair"]["id"] == second
    assert [(row["pair_id"], row["annotator"]) for row in rows(path)] == [(first, "ann"), (first, "ben")]
    assert server.post("/api/undo", json={"annotator": "ann"}).json["pair"]["id"] == first
    assert server.post("/api/undo", json={"annotator": "ann"}).json["pair"]["id"] == first  # nothing left to take back
    vote(server, first, "left")
    vote(server, first, "tie")
    assert [row["label"] for row in rows(path) if row["annotator"] == "ann"] == [0.5]


def test_a_restarted_server_continues(ballot: Ballot, pairs: Path, path: Path) -> None:
    first, second, third, *_ = ballot.pairs
    before = client(ballot, path)
    vote(before, first, "left")
    vote(before, second, "left")
    after = client(read(pairs), path)
    assert state(after, "ann")["pair"]["id"] == third
    assert state(after, "ben")["pair"]["id"] == first
    assert after.post("/api/undo", json={"annotator": "ann"}).json["pair"]["id"] == second


def test_a_pair_with_enough_votes_is_shown_to_nobody_else(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path, votes_per_pair=1)
    first, second, *_ = ballot.pairs
    vote(server, first, "left")
    assert state(server, "ben")["pair"]["id"] == second


def test_votes_of_several_annotators_at_once_are_all_kept(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path)
    names = [f"annotator {number}" for number in range(4)]
    voters = [
        threading.Thread(target=vote_on_all, args=(server.application.test_client(), name, True)) for name in names
    ]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    written = rows(path)
    assert len({(row["pair_id"], row["annotator"]) for row in written}) == len(written) == 4 * (COUNT - 1)
    assert {row["label"] for row in written} == {1.0}


@pytest.mark.parametrize(
    ("method", "url", "content", "status"),
    [
        ("get", "/api/next", None, 400),
        ("get", "/picture?pair=other&side=left&annotator=ann", None, 404),
        ("get", "/picture?pair=pair 0/a&side=middle&annotator=ann", None, 404),
        ("post", "/api/vote", {"annotator": "ann", "pair": "other", "choice": "left"}, 400),
        ("post", "/api/vote", {"annotator": "ann", "pair": ["x"], "choice": "left"}, 400),
        ("post", "/api/vote", {"annotator": "x" * 101, "pair": "pair 0/a", "choice": "left"}, 400),
        ("post", "/api/vote", ["ann"], 400),
        ("post", "/api/undo", {"annotator": " "}, 400),
    ],
)
def test_bad_requests_are_refused(ballot: Ballot, path: Path, method: str, url: str, content, status: int) -> None:
    answer = getattr(client(ballot, path), method)(url, json=content)
    assert answer.status_code == status
    assert answer.json["error"]
    assert not path.exists()


def test_pages_elsewhere_cannot_vote(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path)
    form = '{"annotator": "ann", "pair": "pair 0/a", "choice": "left"}'  # a form can send text, but not as JSON
    assert server.post("/api/vote", data=form, content_type="text/plain").status_code == 415
    assert server.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
    assert "default-src 'self'" in server.get("/").headers["Content-Security-Policy"]
    assert not path.exists()


@pytest.mark.slow
def test_votes_are_averaged_by_pair(ballot: Ballot, path: Path) -> None:
    server = client(ballot, path)
    first, second, *_ = ballot.pairs
    for annotator, red in (("ann", True), ("ben", True), ("cy", False)):
        side = "left" if (ballot.image_on("left", first, annotator) == 0) == red else "right"
        vote(server, first, side, annotator)
    vote(server, second, "tie", "ann")
    assert read_labels(path) == {first: PairVotes(pytest.approx(2 / 3), 3, None), second: PairVotes(0.5, 1, "ann")}


def test_votes_replace_the_labels_of_their_pairs_only() -> None:
    schema = pa.schema(
        [("pair_id", pa.string()), ("label", pa.float32()), ("votes", pa.int32()), ("annotator", pa.string())]
    )
    rows = [("a", 1.0, 20, "x"), ("b", None, None, None), ("c", 0.0, 3, None), ("b", 1.0, 2, "y")]
    pairs = pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)
    labelled = with_labels(
        pairs, {"b": PairVotes(0.25, 4, None), "a": PairVotes(0.0, 1, "ann"), "z": PairVotes(1, 1, "ann")}
    )
    assert labelled.schema == schema
    assert [tuple(row.values()) for row in labelled.to_pylist()] == [
        ("a", 0.0, 1, "ann"),
        ("b", 0.25, 4, None),
        ("c", 0.0, 3, None),
        ("b", 0.25, 4, None),
    ]
    assert with_labels(pairs, {}) is pairs


def test_another_file_is_not_taken_for_votes(tmp_path: Path, pairs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"pair_id": ["a"], "label": [1.5]}), tmp_path / "soft.parquet")
    with pytest.raises(UserError, match=r"a label is 1\.5"):
        read_labels(tmp_path / "soft.parquet")
    pq.write_table(pa.table({"pair_id": ["a"]}), tmp_path / "other.parquet")
    done = run_here(capfd, "smpo-pipeline", "vote", "--pairs", pairs, "--out", tmp_path / "other.parquet")
    assert_one_line(done, "--out", "other.parquet has no column 'label'")
    done = run_here(capfd, "smpo-pipeline", "vote", "--pairs", pairs, "--out", tmp_path / "labels.csv")
    assert_one_line(done, "labels.csv: expected a file that ends in .parquet")
