"""``lora-analysis sweep``: train the runs of a TOML file, locally or on a Ray cluster."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    DONE,
    PARTLY_FAILED,
    OutputPath,
    VerbCommand,
    output_options,
    progress_bar,
    tracker_option,
)
from lora_analysis.cli.show import print_json, print_table
from lora_analysis.errors import InputError
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Shard
    from lora_analysis.training import RunEvent, SweepPlan, SweepResult


class _ShardType(click.ParamType):  # type: ignore[type-arg]  # generic in new clicks only
    """``k/n``."""

    name = "k/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the shard, or raise a usage error."""
        from lora_analysis.execution.protocol import Shard

        try:
            return Shard.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


_HELP = """Train an adapter for every combination of the options in a TOML file.

FILE has the options of a run, and an option with a list of values is an axis:

\b
    task = ["rotate", "mirror"]
    rank = [1, 2, 4, 8, 64]
    seed = [0, 1, 2]            # or seed.init = [0, 1] and seed.data = [0, 1]
    [loop]
    steps = 240

If the command is interrupted, run it again to continue. Each table [[grid]] is a sweep of its own
that overrides the options at the top; [execution] sets how and where to train. All options of
every run are written to sweep.json in the output folder.
"""


@click.command(name="sweep", cls=VerbCommand, help=_HELP)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml")
@click.option(
    "-o",
    "--output",
    type=OutputPath(file_okay=False, path_type=Path),
    help="Output folder, with one folder per run. By default the one named in FILE, or FILE "
    "without its suffix.",
)
@click.option(
    "--executor",
    type=click.Choice(["auto", "serial", "process", "ray"]),
    help="How to run in parallel: in this process (serial), one process per core or GPU, or a "
    "Ray cluster.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Number of runs in parallel.")
@click.option("--device", help="Device: auto, cpu, cuda or mps.")
@click.option(
    "--address", help="Address of the Ray cluster. By default one is started on this machine."
)
@click.option(
    "--shard",
    type=_ShardType(),
    help="Part of the runs: every n-th from the k-th on, for task k of n of a Slurm array.",
)
@click.option(
    "--only", metavar="NAME", multiple=True, help="Name of a run to train; can be repeated."
)
@tracker_option
@click.option(
    "--print-jobs", is_flag=True, help="Print a command for each unfinished run; train nothing."
)
@click.option("--status", is_flag=True, help="Print the state of each run; train nothing.")
@click.option("--force", is_flag=True, help="Train runs again whose configuration changed.")
@output_options("the output folder; with --status, the number of finished runs")
def command(
    file: Path,
    *,
    output: Path | None,
    executor: str | None,
    workers: int | None,
    device: str | None,
    address: str | None,
    shard: Shard | None,
    only: tuple[str, ...],
    trackers: tuple[str, ...],
    print_jobs: bool,
    status: bool,
    force: bool,
    form: str,
) -> int:
    """Train the runs of a file; see ``_HELP``."""
    from lora_analysis.training import read_plan, sweep_states

    plan = read_plan(file)
    folder = output or plan.output or Path(file.stem)
    _check_names(only, plan)
    names = list(only) or list(plan.runs)
    runs = {name: plan.runs[name] for name in (shard.select(names) if shard else names)}
    if print_jobs:
        words = ["sweep", str(file), "-o", str(folder)]
        words += [word for tracker in trackers for word in ("--tracker", tracker)]
        _print_jobs(words, sweep_states(runs, folder), device)
        return DONE
    if status:
        _print_status(sweep_states(runs, folder), folder, form)
        return DONE
    options = {
        "executor": executor,
        "workers": workers,
        "device": device,
        "address": address,
        "trackers": trackers or None,
    }
    result = _train(plan, list(runs), folder, options, force=force, form=form)
    return _print_result(result, folder, form)


def _check_names(names: Sequence[str], plan: SweepPlan) -> None:
    """Raise if a run is named that the file does not describe."""
    from lora_analysis.patterns import near_names

    for name in names:
        if name not in plan.runs:
            near = ", ".join(near_names(name, plan.runs)) or "none"
            message = f"{plan.source} describes no run '{name}'. Near names: {near}."
            raise InputError(message)


def _print_jobs(words: Sequence[str], states: Mapping[str, str], device: str | None) -> None:
    """Print a command for each unfinished run."""
    more = ["--device", device] if device else []
    for name, state in states.items():
        if state != "finished":
            click.echo(shlex.join(["lora-analysis", *words, "--only", name, *more]))


def _print_status(states: Mapping[str, str], folder: Path, form: str) -> None:
    """Print the state of each run, and why the failed ones failed."""
    reasons = {name: _read_failure(folder / name) for name in states}
    finished = sum(state == "finished" for state in states.values())
    if form == "json":
        facts = [{"name": n, "state": s, "failure": reasons[n]} for n, s in states.items()]
        print_json({"folder": folder, "runs": facts})
    elif form == "quiet":
        click.echo(finished)
    else:
        title = f"{finished} of {len(states)} runs are finished in {folder}"
        print_table(title, ("run", "state"), states.items(), numbers_from=2, cut_names=False)
        for name, reason in reasons.items():
            if reason:
                click.echo(printable(f"{name} failed: {reason}"))


def _train(
    plan: SweepPlan,
    names: Sequence[str],
    folder: Path,
    options: Mapping[str, Any],
    *,
    force: bool,
    form: str,
) -> SweepResult:
    from dataclasses import replace

    from lora_analysis.training import run_sweep

    def print_note(event: RunEvent) -> None:
        if event.note:
            click.echo(f"{event.label}: {event.note}", err=True)

    changes = {key: value for key, value in options.items() if value is not None}
    with progress_bar(form) as progress:
        return run_sweep(
            plan.runs,
            folder,
            names=names,
            execution=replace(plan.execution, **changes),
            force=force,
            progress=progress,
            on_event=print_note,
        )


def _read_failure(folder: Path) -> str | None:
    """Return the error of a run that failed, otherwise None."""
    from lora_analysis.storage.documents import read_json_object
    from lora_analysis.training import FAILURE_NAME

    path = folder / FAILURE_NAME
    try:
        return str(read_json_object(path).get("error")) if path.is_file() else None
    except InputError as error:
        return str(error)


def _print_result(result: SweepResult, folder: Path, form: str) -> int:
    if form == "json":
        print_json(
            {
                "folder": folder,
                "finished": list(result.folders),
                "findings": [finding.to_dict() for finding in result.findings],
                "failures": [failure.to_dict() for failure in result.failures.values()],
            }
        )
    if result.failures and not result.folders:
        result.all_folders()  # raises
    if form != "json":
        click.echo(folder)
    return PARTLY_FAILED if result.failures else DONE
