"""Options for running in parallel: executor, number of workers, address of a cluster."""

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
        click.option(
            "--address", help="Address of a Ray cluster; by default one is started on this machine."
        ),
        click.option("--workers", type=click.IntRange(min=1), help="Number of parallel workers."),
        click.option(
            "--executor",
            "kind_of_executor",
            type=click.Choice(["threads", "process", "ray"]),
            default="threads",
            show_default=True,
            help="How to run in parallel: threads, processes or a Ray cluster.",
        ),
    ):
        command = option(command)
    return command


def analysis_executor(kind: str, workers: int | None, address: str | None) -> Executor | None:
    """Return the requested executor; None for threads, which need none."""
    if kind == "process":
        from lora_analysis.execution import available_workers
        from lora_analysis.execution.processes import ProcessExecutor

        return ProcessExecutor(workers or available_workers())
    if kind == "ray":
        from lora_analysis.execution.cluster import RayExecutor

        return RayExecutor(address=address, workers=workers, gpus=0)
    return None
