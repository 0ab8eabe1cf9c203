"""``lora-analysis sweep``: every run of a TOML file, here, on a cluster, or a share of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.exit_codes import DONE, PARTLY_FAILED
from lora_analysis.cli.options import output_options, progress_bar
from lora_analysis.cli.show import print_json, print_table
from lora_analysis.errors import InputError
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.execution.shards import Shard
    from lora_analysis.training import RunConfig, SweepPlan, SweepResult


class _ShardType(click.ParamType):  # type: ignore[type-arg]  # generic in new clicks only
    """``k/n``."""

    name = "k/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the shard, or fail as click does."""
        from lora_analysis.execution.shards import Shard

        try:
            return Shard.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


_HELP = """Train every combination of what FILE lists; run again, it goes on where it stopped.

FILE holds the options of a run; one that is given a list is an axis:

\b
    task = ["rotate", "mirror"]
    rank = [1, 2, 4, 8, 64]
    seed = [0, 1, 2]            # or seed.init = [0, 1] and seed.data = [0, 1]
    [loop]
    steps = 240

A table [[grid]] is a sweep of its own over what stands at the top; [execution] says where to
train. The runs as they are resolved are in sweep.json beside the results.
"""


@click.command(name="sweep", help=_HELP)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for one folder per run; by default what FILE names, or FILE without its suffix.",
)
@click.option(
    "--executor",
    type=click.Choice(["auto", "serial", "process", "ray"]),
    help="Who trains: this process, one process per core or GPU, or a Ray cluster.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Runs side by side.")
@click.option("--device", help="auto, cpu, cuda or mps.")
@click.option("--address", help="Of the Ray cluster; without it one is started here.")
@click.option(
    "--shard",
    type=_ShardType(),
    help="Only every n-th run from the k-th on, as task k of n in a Slurm array.",
)
@click.option("--only", metavar="NAME", multiple=True, help="Only this run; may be repeated.")
@click.option(
    "--print-jobs", is_flag=True, help="Print one command per unfinished run, and train nothing."
)
@click.option("--status", is_flag=True, help="Say what is finished, and train nothing.")
@click.option("--force", is_flag=True, help="Retrain runs whose configuration changed.")
@output_options
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
    print_jobs: bool,
    status: bool,
    force: bool,
    form: str,
) -> int:
    """Train what a file describes; see ``_HELP``."""
    from lora_analysis.training import read_plan

    plan = read_plan(file)
    folder = output or plan.output or Path(file.stem)
    runs = _chosen(plan, shard, only)
    if print_jobs:
        return _print_jobs(runs, folder, ["sweep", str(file), "-o", str(folder)], device)
    if status:
        return _print_status(runs, folder, form)
    given = {"executor": executor, "workers": workers, "device": device, "address": address}
    result = _train(plan, list(runs), folder, given, force=force, form=form)
    return _print_result(result, folder, form)


def _chosen(plan: SweepPlan, shard: Shard | None, only: Sequence[str]) -> dict[str, RunConfig]:
    """Return the runs that were asked for."""
    from lora_analysis.patterns import near_names

    for name in only:
        if name not in plan.runs:
            near = ", ".join(near_names(name, plan.runs)) or "none"
            message = f"{plan.source} describes no run '{name}'. Near names: {near}."
            raise InputError(message)
    names = list(only) or list(plan.runs)
    return {name: plan.runs[name] for name in (shard.of(names) if shard else names)}


def _train(
    plan: SweepPlan,
    names: Sequence[str],
    folder: Path,
    given: Mapping[str, Any],
    *,
    force: bool,
    form: str,
) -> SweepResult:
    from dataclasses import replace

    from lora_analysis.training import SweepProgress, run_sweep

    options = {key: value for key, value in given.items() if value is not None}
    execution = replace(plan.execution, **options)
    with progress_bar(form) as counts:
        return run_sweep(
            plan.runs,
            folder,
            names=names,
            execution=execution,
            force=force,
            progress=SweepProgress(counts, len(names)),
            report=lambda text: click.echo(text, err=True),
        )


def _print_jobs(
    runs: Mapping[str, RunConfig], folder: Path, words: Sequence[str], device: str | None
) -> int:
    from lora_analysis.training import sweep_states

    more = ["--device", device] if device else []
    for name, state in sweep_states(runs, folder).items():
        if state != "finished":
            click.echo(shlex.join(["lora-analysis", *words, "--only", name, *more]))
    return 0


def _print_status(runs: Mapping[str, RunConfig], folder: Path, form: str) -> int:
    from lora_analysis.training import sweep_states

    states = sweep_states(runs, folder)
    reasons = {name: _reason(folder / name) for name, state in states.items()}
    if form == "json":
        found = [{"name": n, "state": s, "failure": reasons[n]} for n, s in states.items()]
        print_json({"folder": folder, "runs": found})
    elif form == "quiet":
        click.echo(sum(state == "finished" for state in states.values()))
    else:
        done = sum(state == "finished" for state in states.values())
        title = f"{done} of {len(states)} runs are finished in {folder}"
        print_table(title, ("run", "state"), states.items(), numbers_from=2, cut_names=False)
        for name, reason in reasons.items():
            if reason:
                click.echo(printable(f"{name} failed: {reason}"))
    return 0


def _reason(place: Path) -> str | None:
    """Return why a run was given up, where it was."""
    from lora_analysis.storage.documents import read_json_object
    from lora_analysis.training import FAILURE_NAME

    note = place / FAILURE_NAME
    try:
        return str(read_json_object(note).get("error")) if note.is_file() else None
    except InputError as error:
        return str(error)


def _print_result(result: SweepResult, folder: Path, form: str) -> int:
    if form == "json":
        print_json(
            {
                "folder": folder,
                "finished": list(result.folders),
                "findings": [finding.to_dict() for finding in result.findings],
                "failures": [
                    {
                        "source": name,
                        "reason": str(failure.error),
                        "kind": type(failure.error).__name__,
                        "attempts": failure.attempts,
                    }
                    for name, failure in result.failures.items()
                ],
            }
        )
    if result.failures and not result.folders:
        result.all_folders()  # raises
    if form != "json":
        click.echo(folder)
    return PARTLY_FAILED if result.failures else DONE
