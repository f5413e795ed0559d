"""Run a selection: read the scores, choose pairs, then read the candidates and write the pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version

from rich.console import Console
from rich.progress import Progress

from smpo_common.discovery import source_sha256
from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_file
from smpo_common.options import flag_name
from smpo_common.store_path import AnyPath
from smpo_pipeline.images.image_store import ImageStore
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import Run, describe_input, read_identity
from smpo_pipeline.selection.assemble import Assembly, Labelling
from smpo_pipeline.selection.candidates import CandidateTable
from smpo_pipeline.selection.further_columns import FurtherColumns
from smpo_pipeline.selection.judges import find_judge, judges, make_judge
from smpo_pipeline.selection.methods import Rules, Selection, find_selection, selections
from smpo_pipeline.selection.options import SelectOptions
from smpo_pipeline.selection.pairs_file import PairsFile
from smpo_pipeline.selection.scores_table import write_selected_scores
from smpo_schemas.generation.selection import (
    PAIRS_FILE,
    SCORES_FOLDER,
    SELECTED_SCHEMA,
    SELECTION_FILE,
    SELECTION_VERSION,
    Gaps,
    SelectionInfo,
    SelectionInput,
    SelectionReward,
    SelectionSettings,
    read_selection,
    write_selection,
)
from smpo_schemas.pairs import PairFile, layouts_of, list_pair_files
from smpo_schemas.preference.scales import calibrated_temperatures, refuse_unused_ranges, with_ranges
from smpo_schemas.preference.winrate import WinRate
from smpo_schemas.rejects import REJECTS_FILE, count_reasons, write_rejects
from smpo_schemas.scoring.calibration import read_calibration
from smpo_schemas.scoring.scores import SCORES_FILE, ScoresInfo, read_scores, read_scores_info

_OWN_FLAGS = {"dominated_only": False, "loser": "last", "judge": "rewards"}
"""Flags that only some methods use, with their defaults."""


def select(options: SelectOptions, console: Console) -> SelectionInfo:
    """Select pairs, or return those of a finished run with the same settings.

    Raises:
        UserError: an input cannot be used, the output is another run's, or no prompt gives a pair.
    """
    kind = _method(options)
    choices = options.columns.choices()
    files = list_pair_files(options.candidates, choices, "--candidates")
    info = read_scores_info(options.scores)
    mix = _mix(options, info, lambda line: console.print(line, highlight=False, soft_wrap=True))
    settings = _settings(options, kind, mix)
    identity = {
        "job": "select",
        "schema_version": SELECTION_VERSION,
        **describe_input(files, choices, None),
        "scores": [part.content for part in info.parts],
        "selection": settings.model_dump(),
    }
    judge = make_judge(options.judge, mix.weights, mix.scales) if "judge" in kind.flags else None
    run = Run(options.out, SELECTION_FILE, identity)
    with locked(options.out):
        patterns = (PAIRS_FILE, REJECTS_FILE, f"{SCORES_FOLDER}/")
        _refuse_foreign_files(options.out, patterns)
        if not run.open(overwrite=options.overwrite, patterns=patterns):
            return read_selection(options.out)
        console.print(_choices(settings, files), highlight=False, soft_wrap=True)
        rules = Rules(options.pairs_per_prompt, options.min_gap, options.dominated_only, options.loser, judge)
        selection = _run(options, files, info, mix, kind(rules), settings)
        write_selection(options.out, selection)
        run.finish()
        return selection


def _refuse_foreign_files(out: AnyPath, patterns: Sequence[str]) -> None:
    """Refuse to replace files of other origin, such as the candidates themselves.

    Raises:
        UserError: the folder holds such files, and no record of a run.
    """
    if read_identity(out) is None:
        for name in (pattern.rstrip("/") for pattern in patterns):
            if (out / name).exists():
                raise UserError(f"--out {out} holds {name}, which is not from `select`; choose another --out")


def _method(options: SelectOptions) -> type[Selection]:
    """Return the class of the method.

    Raises:
        UserError: it does not exist, or a flag is given that it does not use.
    """
    kind = find_selection(options.by)
    for name, default in _OWN_FLAGS.items():
        if getattr(options, name) != default and name not in kind.flags:
            users = " or ".join(method.name for method in selections().values() if name in method.flags)
            raise UserError(
                f"{flag_name(name)} has no effect with --by {options.by}; leave it out, or use --by {users}"
            )
    return kind


def _mix(options: SelectOptions, info: ScoresInfo, say: Callable[[str], None]) -> WinRate:
    """Resolve rewards, weights and scales, as training does for ``--preference winrate``.

    Raises:
        UserError: a reward was not scored or not calibrated, is constant, or the flags do not fit each other.
    """
    given = options.rewards
    calibration = read_calibration(given.calibration) if given.calibration else None
    weights = dict(given.reward)
    if not weights:
        weights = (
            {name: reward.weight for name, reward in calibration.rewards.items()}
            if calibration
            else dict.fromkeys(info.rewards, 1.0)
        )
    for name in weights:
        if name not in info.rewards:
            flag = "--reward" if name in given.reward else "--calibration has the reward"
            raise UserError(f"{flag} {name}: not in --scores {options.scores}, which has: {', '.join(info.rewards)}")
    refuse_unused_ranges(given.reward_range, weights)
    if calibration is None:
        return WinRate(weights, with_ranges(info.rewards, given.reward_range))
    if given.reward_range:
        raise UserError(
            f"--reward-range has no effect with --calibration {given.calibration}, which sets the scales; give one of "
            "them"
        )
    return WinRate(
        weights, info.rewards, calibrated_temperatures(calibration, weights, info.rewards, given.calibration, say)
    )


def _settings(options: SelectOptions, kind: type[Selection], mix: WinRate) -> SelectionSettings:
    judge = find_judge(options.judge) if "judge" in kind.flags else None
    rewards = {name: SelectionReward(weight=weight, scale=mix.scales[name]) for name, weight in mix.weights.items()}
    return SelectionSettings(
        by=options.by,
        by_sha256=None if kind in selections().values() else source_sha256(kind),
        judge=_recorded(options.judge) if judge else None,
        judge_sha256=None if judge is None or judge in judges().values() else source_sha256(judge),
        rewards=rewards,
        pairs_per_prompt=options.pairs_per_prompt,
        min_gap=options.min_gap,
        dominated_only=options.dominated_only,
        loser=options.loser,
        seed=options.seed,
        label=options.label,
    )


def _recorded(spec: str) -> str:
    """Return ``--judge`` without what affects no answer."""
    name, equals, model = spec.partition("=")
    return f"{name}={find_judge(spec).recorded(model)}" if equals else name


def _choices(settings: SelectionSettings, files: Sequence[PairFile]) -> str:
    """Describe what was decided, in one line."""
    rewards = ", ".join(
        f"{name} (share {reward.weight:.3g}, scale {reward.scale:.4g})" for name, reward in settings.rewards.items()
    )
    judge = f", judge {settings.judge}" if settings.judge else ""
    rows = sum(file.rows for file in files)
    return f"{rows} rows of candidates; by {settings.by}{judge}; rewards: {rewards}; seed {settings.seed}"


def _run(
    options: SelectOptions,
    files: Sequence[PairFile],
    info: ScoresInfo,
    mix: WinRate,
    method: Selection,
    settings: SelectionSettings,
) -> SelectionInfo:
    """Write the pairs, the rejects and the scores table; describe them.

    Raises:
        UserError: no prompt gives a pair, or a file cannot be read or written.
    """
    layouts = layouts_of(files)
    scores = read_scores(options.scores, info)
    table = CandidateTable(options.scores, scores, mix, options.seed)
    further = FurtherColumns({path: layout.columns for path, layout in layouts.items()}, SELECTED_SCHEMA.names)
    labelling = Labelling(f"select:{method.name}", options.label, options.seed)
    rows = sum(file.rows for file in files)
    with (
        atomic_path(options.out / PAIRS_FILE) as path,
        Progress(transient=True) as progress,
        ImageStore() as store,
    ):
        task = progress.add_task("reading candidates", total=rows)
        with (
            PairsFile(path, further.types) as file,
            Assembly(table, method, further, labelling, store, file) as assembly,
        ):
            assembly.read(files, layouts, lambda done: progress.update(task, completed=done))
            assembly.finish()
        _require_pairs(assembly)
        pairs_sha256 = sha256_file(path)
    write_rejects(options.out / REJECTS_FILE, assembly.rejects)
    write_selected_scores(options.out / SCORES_FOLDER, scores, info, assembly.pairs, labelling.annotator, table.place_I)
    gaps = [pair.gap for pair in assembly.pairs]
    return SelectionInfo(
        schema_version=SELECTION_VERSION,
        version=version("smpo-diffusion"),
        settings=settings,
        candidates=[
            SelectionInput(path=str(file.path), rows=file.rows, bytes=file.bytes, sha256=file.digest) for file in files
        ],
        scores_sha256=sha256_file(options.scores / SCORES_FILE),
        rows=assembly.rows,
        images=len(table.image_ids),
        prompts=len(table.prompts),
        prompts_with_pairs=len({pair.prompt for pair in assembly.pairs}),
        pairs=len(gaps),
        gaps=Gaps(min=min(gaps), mean=math.fsum(gaps) / len(gaps), max=max(gaps)),
        rejected=len(assembly.rejects),
        reasons=count_reasons(assembly.rejects),
        pairs_sha256=pairs_sha256,
        comparisons=len(method.shown_first),
        shown_first=math.fsum(method.shown_first) / len(method.shown_first) if method.shown_first else None,
    )


def _require_pairs(assembly: Assembly) -> None:
    """Refuse an empty selection.

    Raises:
        UserError: there is no pair.
    """
    if not assembly.pairs:
        reasons = ", ".join(f"{kind} ({count})" for kind, count in count_reasons(assembly.rejects).items())
        example = assembly.rejects[-1]
        raise UserError(f"no prompt gives a pair: {reasons}; the last: {example.source}: {example.reason}")
