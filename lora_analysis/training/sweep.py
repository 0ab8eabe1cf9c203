"""Many runs into one folder: what is finished is skipped, the rest trained by worker processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_analysis.errors import InputError
from lora_analysis.training.config import RunConfig
from lora_analysis.training.runs import Progress, RunEvent, run_state, train_run
from lora_analysis.training.workers import train_in_processes

# Each worker holds some 350 MB: two of them and the caller stay below 1.5 GB.
MAX_DEFAULT_WORKERS = 4


def demo_sweep() -> list[RunConfig]:
    """Return the demo's 13 runs: ranks, seeds and tasks apart from each other.

    Rank 8 on three tasks with three seeds: pairs of other tasks and other seeds are the reference,
    pairs of other tasks and one seed show what a shared start does. Ranks 4 and 64 with two seeds
    on one task: pairs over ranks, with and without a shared seed. The order of the data follows
    the seed.
    """
    cells = [(task, 8, seed) for task in ("rotate", "invert", "mirror") for seed in (0, 1, 2)]
    cells += [("rotate", rank, seed) for rank in (4, 64) for seed in (0, 1)]
    return [RunConfig(task=task, rank=rank, seed=seed) for task, rank, seed in cells]


def run_sweep(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Train every run that is not finished yet, each into ``folder / config.name``.

    Runs that are done stay whatever happens to the others, so that an interrupted sweep goes on
    when it is called again. The result of a run does not depend on the number of workers.

    Parameters
    ----------
    configs
        The runs, of different names.
    folder
        Where their folders lie; made where it does not exist.
    device
        ``"auto"``, or a device as torch names it.
    workers
        Processes that train side by side. None: on a CPU one per core that this process may use,
        at most 4; one on any other device. With one worker, or one run to train, it is done in
        this process. Worker processes import the caller's main module anew, so a script must
        guard its own start with ``if __name__ == "__main__"``.
    progress
        Called in this process with every :class:`RunEvent` of every run.

    Returns
    -------
    list[Path]
        The folders of the runs, in the order of ``configs``.

    Raises
    ------
    InputError
        Two runs have one name, ``workers`` is below 1, or a run cannot be trained as asked.
    LoraAnalysisError
        A worker process ended before its run was done.
    """
    _check_names(configs)
    if workers is not None and workers < 1:
        message = f"workers must be at least 1, found {workers}."
        raise InputError(message)
    places = {config: folder / config.name for config in configs}
    todo: list[RunConfig] = []
    for config, place in places.items():
        state = run_state(config, place)
        if state != "finished":
            todo.append(config)
        elif progress is not None:
            total = config.loop.steps
            progress(RunEvent(config.name, "skipped", total, total, state=state))
    if not todo:
        return list(places.values())
    count = min(workers or _default_workers(device), len(todo))
    if count == 1:
        for config in todo:
            train_run(config, places[config], device=device, progress=progress)
    else:
        jobs = [(config, places[config]) for config in todo]
        train_in_processes(jobs, count, device=device, progress=progress)
    return list(places.values())


def _check_names(configs: Sequence[RunConfig]) -> None:
    twice = [name for name, n in Counter(config.name for config in configs).items() if n > 1]
    if twice:
        message = (
            f"{len(twice)} of the runs share a folder name, '{twice[0]}' among them. "
            "Task, rank, seed and data seed must tell the runs of one folder apart."
        )
        raise InputError(message)


def _default_workers(device: str) -> int:
    from lora_analysis.training.devices import resolve_device

    if resolve_device(device).type != "cpu":
        return 1
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system can say which cores are ours
        cores = os.cpu_count() or 1
    return min(cores, MAX_DEFAULT_WORKERS)
