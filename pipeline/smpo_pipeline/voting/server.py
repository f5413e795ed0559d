"""The web application: the page, the pictures, and votes as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast, get_args

from flask import Flask, Response, abort, jsonify, request
from werkzeug.exceptions import HTTPException

from smpo_common.errors import UserError
from smpo_pipeline.voting.ballot import Ballot, Side
from smpo_pipeline.voting.votes import Votes
from smpo_schemas.labels import TIE

_NAME_LENGTH = 100
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Views:
    """What the page asks for."""

    def __init__(self, ballot: Ballot, votes: Votes, votes_per_pair: int | None) -> None:
        self._ballot, self._votes, self._votes_per_pair = ballot, votes, votes_per_pair

    def next_pair(self) -> Response:
        """Answer with the first pair that the annotator has not voted on."""
        return self._state(_name(request.args))

    def picture(self) -> Response:
        """Answer with an image of a pair, by the side on which the annotator sees it."""
        pair_id, side = request.args.get("pair"), request.args.get("side")
        if pair_id not in self._ballot.pairs or side not in get_args(Side):
            abort(404)
        image = self._ballot.image_on(cast("Side", side), pair_id, _name(request.args))
        return Response(self._ballot.picture(pair_id, image), mimetype="image/png")

    def vote(self) -> Response:
        """Take a vote; answer as :meth:`next_pair`."""
        given = request.get_json()
        annotator, pair_id, choice = _name(given), given.get("pair"), given.get("choice")
        if not isinstance(pair_id, str) or pair_id not in self._ballot.pairs or choice not in ("left", "right", "tie"):
            abort(400, "expected a pair of this ballot and a choice: left, right or tie")
        label = TIE if choice == "tie" else float(self._ballot.image_on(choice, pair_id, annotator) == 0)
        self._votes.cast(pair_id, annotator, label)
        return self._state(annotator)

    def undo(self) -> Response:
        """Take back the annotator's latest vote, and show its pair."""
        annotator = _name(request.get_json())
        pair_id = self._votes.undo(annotator)
        return self._state(annotator, pair_id if pair_id in self._ballot.pairs else None)

    def _state(self, annotator: str, first: str | None = None) -> Response:
        """Answer with the pair to show (``first`` if given), the one whose pictures to load ahead, and the progress."""
        shown = [pair_id for pair_id in ([first] if first else []) if self._ballot.is_usable(pair_id)]
        for pair_id in self._ballot.pairs:
            if len(shown) > 1:
                break
            if pair_id != first and self._wanted(pair_id, annotator) and self._ballot.is_usable(pair_id):
                shown.append(pair_id)
        usable = self._ballot.pairs.keys() - self._ballot.left_out.keys()
        return jsonify(
            pair={"id": shown[0], "prompt": self._ballot.pairs[shown[0]].prompt} if shown else None,
            then=shown[1] if len(shown) > 1 else None,
            done=sum(annotator in self._votes.of_pair(pair_id) for pair_id in usable),
            total=len(usable),
            left_out=len(self._ballot.left_out),
            agreement=asdict(self._votes.agreement(annotator)),
        )

    def _wanted(self, pair_id: str, annotator: str) -> bool:
        given = self._votes.of_pair(pair_id)
        return annotator not in given and (self._votes_per_pair is None or len(given) < self._votes_per_pair)


def make_app(ballot: Ballot, votes: Votes, *, votes_per_pair: int | None, hosts: Sequence[str] | None) -> Flask:
    """Make the application.

    Args:
        ballot: the pairs.
        votes: where votes go.
        votes_per_pair: a pair with as many votes is shown to no further annotator; None: all vote on every pair.
        hosts: host names that requests may have, since a page elsewhere can let its own name point here; None: any.
    """
    app = Flask(__name__, static_folder="page", static_url_path="/page")
    app.config["TRUSTED_HOSTS"] = list(hosts) if hosts else None
    app.config["MAX_CONTENT_LENGTH"] = 1 << 16
    views = _Views(ballot, votes, votes_per_pair)
    app.add_url_rule("/", "page", lambda: app.send_static_file("vote.html"))
    app.add_url_rule("/api/next", view_func=views.next_pair)
    app.add_url_rule("/picture", view_func=views.picture)
    app.add_url_rule("/api/vote", view_func=views.vote, methods=["POST"])
    app.add_url_rule("/api/undo", view_func=views.undo, methods=["POST"])
    app.after_request(_with_headers)
    app.register_error_handler(UserError, lambda error: (jsonify(error=str(error)), 500))
    app.register_error_handler(HTTPException, lambda error: (jsonify(error=error.description), error.code or 500))
    return app


def _with_headers(response: Response) -> Response:
    response.headers.update(_HEADERS)
    return response


def _name(given: Any) -> str:  # noqa: ANN401  (a query or parsed JSON)
    """Return the annotator's name in a request; abort the request if there is none."""
    name = given.get("annotator") if hasattr(given, "get") else None
    if not isinstance(name, str) or not name.strip() or len(name) > _NAME_LENGTH:
        abort(400, f"expected an annotator's name of at most {_NAME_LENGTH} characters")
    return name.strip()
