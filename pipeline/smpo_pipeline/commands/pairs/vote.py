"""``smpo-pipeline vote``."""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from smpo_common.errors import UserError
from smpo_common.run_lock import hold
from smpo_pipeline.terminal import print_next
from smpo_pipeline.voting.options import VoteOptions

if TYPE_CHECKING:
    from smpo_pipeline.voting.ballot import Ballot

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_THREADS = 8


def vote(options: VoteOptions) -> None:
    """Label pairs in the browser: two images side by side, keys 1, 2, 0 (equal), U (undo).

    Writes the file of votes after each one. Several people can vote at once, each under a name. Stop with Ctrl-C; the
    same command continues.

    Examples:
        smpo-pipeline vote --pairs data --out votes.parquet
    """
    if options.out.suffix != ".parquet":
        raise UserError(f"--out {options.out}: expected a file that ends in .parquet")
    from waitress.server import create_server  # noqa: PLC0415  (keeps --help quick)

    from smpo_pipeline.voting.server import make_app  # noqa: PLC0415
    from smpo_pipeline.voting.votes import Votes  # noqa: PLC0415

    local = options.host in _LOOPBACK
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    with hold(options.out.parent, fcntl.lockf):
        votes = Votes(options.out)
        ballot = _read(options, console)
        app = make_app(ballot, votes, votes_per_pair=options.votes_per_pair, hosts=_LOOPBACK if local else None)
        try:
            server = create_server(app, host=options.host, port=options.port, threads=_THREADS)
        except OSError as error:
            raise UserError(f"--host {options.host} --port {options.port}: {error.strerror}") from error
        console.print(f"{len(ballot.pairs)} pairs; {len(ballot.left_out)} rows left out; votes go to {options.out}")
        if not local:
            console.print(f"everyone who reaches {options.host} can see the images and vote")
        console.print(f"open http://{options.host}:{server.effective_port}/  (Ctrl-C stops)")
        try:
            server.run()
        finally:
            for place, reason in ballot.left_out.items():
                console.print(f"left out: {place}: {reason}")
            pairs = options.pairs if len(options.pairs) == 1 else ("PAIRS",)
            labelled = ("--labels", options.out, "--reward", "REWARD", "--out", "scores")
            print_next(console, "smpo-pipeline", "score", "--pairs", *pairs, *options.columns.as_flags(), *labelled)


def _read(options: VoteOptions, console: Console) -> Ballot:
    from smpo_pipeline.voting.ballot import Ballot  # noqa: PLC0415

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading pairs", total=None)
        return Ballot.read(
            options.pairs,
            options.columns.choices(),
            limit=options.limit,
            seed=options.seed,
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )
