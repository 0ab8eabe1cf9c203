"""What verbs share that can have their work done elsewhere: by which executor, and how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Executor

Command = TypeVar("Command", bound=Callable[..., Any])


def analysis_executor_options(command: Command) -> Command:
    """Add ``--executor``, ``--workers`` and ``--address``; see `analysis_executor`."""
    for option in (
        click.option("--address", help="Of the Ray cluster; without it one is started here."),
        click.option("--workers", type=click.IntRange(min=1), help="Modules side by side."),
        click.option(
            "--executor",
            "kind_of_executor",
            type=click.Choice(["threads", "process", "ray"]),
            default="threads",
            show_default=True,
            help="Who visits the modules: threads, processes, or a Ray cluster.",
        ),
    ):
        command = option(command)
    return command


def analysis_executor(kind: str, workers: int | None, address: str | None) -> Executor | None:
    """Return the executor that was asked for; None for threads, which need none."""
    if kind == "process":
        from lora_analysis.execution import available_workers
        from lora_analysis.execution.processes import ProcessExecutor

        return ProcessExecutor(workers or available_workers())
    if kind == "ray":
        from lora_analysis.execution.cluster import RayExecutor

        return RayExecutor(address=address, workers=workers, gpus=0)
    return None
