"""The `nacd` command: `nacd distill` is the whole job, `nacd <stage>` does it up to that stage.

    nacd distill --config demo --match.inner_steps 12     # a recipe (a file, or a name from recipes/) and overrides
    nacd match --config my.yaml --dry-run                 # what would be done

`nacd report --out RUN` renders its report anew; `nacd select` chooses samples of a set, `nacd transfer` tunes a model
on a distilled one, with the fields of SelectionConfig and TransferConfig for flags. `nacd store` looks into trajectory
files and `nacd export` writes a set for other trainers, with flags of their own. The other flags are generated from the
fields of RunConfig. Bad input is one sentence on stderr and exit status 2; --debug shows the traceback. Ctrl-C exits
with 130, and the same command goes on where it stopped.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .config import RunConfig, SelectionConfig, TransferConfig
from .errors import InputError

RECIPES = Path(__file__).parent / "recipes"
HELP = {
    "distill": "the whole job",
    "select": "one selection by itself: which samples of a set are kept",
    "experts": "up to the expert trajectories",
    "match": "up to the learned prompts (Algorithm 1)",
    "decode": "up to the distilled set",
    "tune": "up to the tuned models",
    "evaluate": "up to the scores",
    "report": "the report of a run folder, from what is in it",
    "transfer": "tune any model on a distilled set alone",
    "export": "a distilled set as chat JSONL for TRL, Axolotl and LLaMA-Factory",
    "store": "inspect, verify or convert a trajectory file",
}
Settings = RunConfig | SelectionConfig | TransferConfig
OWN: dict[str, type[Settings]] = {"select": SelectionConfig, "transfer": TransferConfig}  # the others set RunConfig


def settings_of(command: str) -> type[Settings]:
    """What the flags and the recipe of a command set."""
    return OWN.get(command, RunConfig)


def recipe(name: str) -> str:
    """Path of a recipe: a file, or the name of one in recipes/. Raises InputError if it holds no settings."""
    named = RECIPES / f"{name}.yaml"
    if not Path(name).is_file() and not named.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise InputError(f"--config {name}: no such file, and no recipe of that name (recipes: {known})")
    path = name if Path(name).is_file() else str(named)
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: malformed YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must hold settings by name, not {type(settings).__name__}")
    for field in fields(RunConfig):
        if is_dataclass(field.type) and not isinstance(settings.get(field.name, {}), dict):
            raise InputError(f"{path}: {field.name}={settings[field.name]!r}: must be settings by name")
    return path


def with_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments, with a path in place of a recipe's name behind `--config` or `--config=`."""
    found: list[str] = []
    for value in arguments:
        behind = bool(found) and found[-1] == "--config"
        flag, equals, name = value.partition("=")
        found.append(recipe(value) if behind else f"--config={recipe(name)}" if flag + equals == "--config=" else value)
    return found


def make_parser(command: str) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"nacd {command}",
        description=f"NACD data distillation: {HELP[command]}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="recipe: a YAML file, or a name from nacd_fast/recipes")
    parser.add_argument(
        "--dry-run", dest="dry_run", action="store_true", help="print the resolved settings and the plan; write nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(settings_of(command), None)
    return parser


def parse(command: str, arguments: list[str]) -> tuple[Settings, bool, bool]:
    """The settings, and whether to --dry-run and to --debug. Raises InputError on unknown or ill-typed settings."""
    parser = make_parser(command)
    arguments = with_recipes(arguments)
    try:
        found = parser.instantiate(parser.parse_args(arguments))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(" ".join(str(error).split())) from None
    values = {name: value for name, value in vars(found).items() if name not in ("config", "dry_run", "debug")}
    return settings_of(command)(**values), found.dry_run, found.debug


def be_quiet() -> None:
    """No bars and notices of the libraries between our own."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def execute(command: str, config: Settings, dry_run: bool) -> None:
    from . import distill, distilled, report, transfer  # torch and transformers load only from here
    from .selection import command as selection

    be_quiet()
    if isinstance(config, TransferConfig):
        found = distilled.load_distilled(config.distilled)
        print((distill.to_yaml(config) + "\n" if dry_run else "") + transfer.plan(config, found), flush=True)
        if not dry_run:
            print(f"transfer: {transfer.run(config, found)}")
        return
    if isinstance(config, SelectionConfig):
        pool = selection.read_pool(config)
        print((distill.to_yaml(config) + "\n" if dry_run else "") + selection.plan(config, pool), flush=True)
        if not dry_run:
            print(f"select: {selection.run(config, pool)}")
        return
    if dry_run:
        job = distill.Job(config)
        job.check()
        print(distill.to_yaml(config) + "\n" + job.plan())
        return
    if command == "report":
        print(f"report: {report.run(Path(config.out))}")
    else:
        distill.run(config, until="report" if command == "distill" else command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command line `arguments` (without the program's name)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"nacd {__version__}")
        return 0
    if not given or given[0] not in HELP:
        wants_help = bool(given) and given[0] in ("-h", "--help")
        lines = [f"  {name:9} {text}" for name, text in HELP.items()]
        print(
            "\n".join(["usage: nacd COMMAND [--config RECIPE] [--help] ...", "       nacd --version", *lines]),
            file=sys.stdout if wants_help else sys.stderr,
        )
        return 0 if wants_help else 2
    debug = "--debug" in given
    try:
        if given[0] == "store":
            from .store import command  # torch loads only from here

            command.run(given[1:])
        elif given[0] == "export":
            from . import export

            be_quiet()
            export.command(given[1:])
        else:
            config, dry_run, debug = parse(given[0], given[1:])
            execute(given[0], config, dry_run)
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        print(f"nacd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads our output has seen enough; nothing more may go there, at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder without permission
        if debug:
            raise
        print(f"nacd: {error.filename or given[0]}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if given[0] in ("store", "export") else "; the same command goes on from here"
        print(f"nacd: interrupted{goes_on}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
