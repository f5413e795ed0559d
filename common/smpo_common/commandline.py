"""Shared by both command lines: config files, repeated options, one-line errors, stopping on signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from smpo_common.errors import UserError
from smpo_common.retry import TRANSIENT_ERRNOS

CONFIG_FILE = "config.yaml"

_OTHER_NAMES = {
    "learning_rate": "lr",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "max_train_steps": "max_steps",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "checkpointing_steps": "save_every",
    "dataloader_num_workers": "workers",
    "rank": "lora_rank",
    "beta_dpo": "beta",
    "pretrained_model_name_or_path": "model",
    "output_dir": "out",
    "num_inference_steps": "steps",
    "mixed_precision": "dtype",
    "validation_prompts": "image_prompts",
    "validation_every": "image_every",
    "validation_steps": "image_every",
    "validation_sampling_steps": "image_sampling_steps",
    "validation_guidance_scale": "image_guidance_scale",
    "hub_model_id": "push_to_hub",
    "private": "hub_private_repo",
    "walks": "trajectories",
    "walker": "inverting_unet",
}
"""Names that diffusers' and transformers' scripts, and earlier versions, use for our flags, for "did you mean"."""


_GONE = {
    "text": "it is a flag of `smpo-pipeline invert`: training uses the text stored in the shards, or else encodes "
    "prompts itself; leave it out",
}
"""What to do about flags that a command had in earlier versions."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """Guess which of ``known`` a misspelt or foreign name means, or None."""
    other = _OTHER_NAMES.get(name)
    if other in known:
        return other
    return next(iter(get_close_matches(name, sorted(known), n=1)), None)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of this command; flags on the command line override them."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    # --version, --install-completion and the like are not passed to the command, so they are not settings.
    settings = (parameter for parameter in context.command.params if getattr(parameter, "expose_value", True))
    known = {str(parameter.name) for parameter in settings} - {"config"}
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must be a YAML mapping of flags to values, like a finished run's config.yaml")
    unknown = sorted(set(map(str, values)) - known)
    if unknown:
        if unknown[0] in _GONE:
            raise UserError(f"--config {path}: unknown key {unknown[0]!r}; {_GONE[unknown[0]]}")
        meant = nearest(unknown[0], known)
        hint = f"did you mean {meant!r}?" if meant else f"known: {', '.join(sorted(known))}"
        raise UserError(f"--config {path}: unknown key {unknown[0]!r}; {hint}")
    repeatable = {option.name for option in context.command.params if getattr(option, "multiple", False)}
    lists = {name: [value] for name, value in values.items() if name in repeatable and not isinstance(value, list)}
    context.default_map = {**(context.default_map or {}), **values, **lists}
    return path


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smpo-diffusion {version('smpo-diffusion')}")
        raise typer.Exit


VERSION = Annotated[
    bool,
    typer.Option(
        "--version",
        metavar="",
        callback=_print_version,
        is_eager=True,
        expose_value=False,
        help="Print the version and exit.",
    ),
]
"""A program's ``--version`` flag."""


def _prepare(app: typer.Typer, arguments: Sequence[str]) -> list[str]:
    """Expand repeated options and suggest our name for another program's flag.

    Raises:
        UserError: a flag has the name that another program uses for it.
    """
    command: Any = typer.main.get_command(app)
    chosen = getattr(command, "commands", {}).get(arguments[0] if arguments else "", command)
    known = {name for parameter in chosen.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for flag in (argument.partition("=")[0] for argument in arguments):
        meant = f"--{_OTHER_NAMES.get(flag[2:].replace('-', '_'), '')}".replace("_", "-")
        if flag.startswith("--") and flag not in known and meant in known:
            raise UserError(f"unknown flag {flag}; did you mean {meant}?")
        if flag.startswith("--") and flag not in known and flag[2:] in _GONE:
            raise UserError(f"unknown flag {flag}; {_GONE[flag[2:]]}")
    multiple = (parameter for parameter in chosen.params if getattr(parameter, "multiple", False))
    return expand_repeated(arguments, {name for parameter in multiple for name in parameter.opts})


def expand_repeated(arguments: Sequence[str], repeatable: set[str]) -> list[str]:
    """Rewrite ``--pairs a b c`` as ``--pairs a --pairs b --pairs c``, so that a shell's ``*.parquet`` works."""
    expanded: list[str] = []
    option: str | None = None
    filled = False
    for argument in arguments:
        if argument.startswith("-"):
            option, filled = (argument if argument in repeatable else None), False
            expanded.append(argument)
        elif option and filled:
            expanded += [option, argument]
        else:
            expanded.append(argument)
            filled = True
    return expanded


def run_app(app: typer.Typer) -> None:
    """Run a command line and exit with its status.

    A user's mistake or a storage failure prints one line and exits with 2. Ctrl-C and SIGTERM print how to resume and
    exit with 130 and 143; so does a command that exits with one of these itself.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app(_prepare(app, sys.argv[1:]))
    except SystemExit as ended:
        if ended.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            _print_how_to_resume()
        raise
    except UserError as error:
        _fail(str(error))
    except PermissionError as error:
        _fail(f"no permission for {error.filename}: {error.strerror}")
    except OSError as error:
        if error.errno is None:  # a library's own subclass, for something other than a system call
            raise
        remedy = "; run the same command again to resume" if error.errno in TRANSIENT_ERRNOS else ""
        _fail(f"{error.filename or 'storage'}: {error.strerror}{remedy}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_how_to_resume() -> None:
    if os.environ.get("RANK", "0") == "0":  # once for all processes of a launcher
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        typer.secho(f"stopped; run the same command again{without} to resume", err=True)


def _terminate(*_signal: object) -> NoReturn:
    """Exit by an exception, as Ctrl-C does, so that cleanup code runs; ignore further SIGTERMs meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _fail(message: str) -> None:
    typer.secho(f"error: {message}", fg="red", err=True)
    sys.exit(2)
