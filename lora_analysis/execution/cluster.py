"""Jobs on the machines of a Ray cluster, or on a local one started for them (extra ``ray``)."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import InputError, LoraAnalysisError, LostWorkerError, require_package
from lora_analysis.execution.protocol import (
    EventHandler,
    Failed,
    Job,
    Outcome,
    Result,
    Retried,
    Work,
    attempt,
    is_final,
)

if TYPE_CHECKING:
    from types import ModuleType

# Seconds between two checks for events while no job ends.
_INTERVAL = 0.2
_PATIENCE = 5.0  # seconds that work has to end when it is interrupted


class RayExecutor:
    """Runs jobs wherever a Ray cluster has free CPUs and GPUs.

    Parameters
    ----------
    address
        Address of the cluster: ``"auto"``, ``"host:6379"`` or ``"ray://host:10001"``. None takes
        ``$RAY_ADDRESS``, or starts a cluster on this machine and shuts it down afterwards. A
        connection that is already open is used as it is, and left open.
    workers
        Maximum number of jobs at the same time; None runs as many as fit into the cluster.
    cpus, gpus
        CPUs and GPUs of one job. ``gpus`` may be a fraction; None takes one if the cluster has
        any.

    Raises
    ------
    MissingExtraError
        Ray is not installed. ``InputError`` if the cluster cannot be reached when work begins.

    Notes
    -----
    Every machine needs this package, in the same version, and the folders that the work reads
    and writes at the same paths; relative ones start from the caller's working folder. A job
    whose process or machine is lost is retried on another.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float | None = None,
    ) -> None:
        _import_ray()
        self.address = address
        self.workers = workers
        self.cpus = cpus
        self.gpus = gpus

    def map(
        self,
        function: Work[Job, Result],
        jobs: Iterable[Job],
        *,
        on_event: EventHandler | None = None,
    ) -> Generator[Outcome[Job, Result], None, None]:
        """Yield the outcome of every job; see `protocol.Executor`."""
        ray = _import_ray()
        starts_connection = not ray.is_initialized()
        if starts_connection:
            address = self.address or os.environ.get("RAY_ADDRESS")
            # A cluster started here has one CPU per worker.
            local = {} if address else {"num_cpus": self.workers, "include_dashboard": False}
            try:
                ray.init(
                    address=address or "local", log_to_driver=False, logging_level="ERROR", **local
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                message = (
                    f"Cannot connect to a Ray cluster at {address or 'this machine'}: "
                    f"{_last_line(error)} Is it running, reachable from this machine, of the same "
                    "version of Ray and Python, and is its token (RAY_AUTH_TOKEN), if it has one, "
                    "set?"
                )
                raise InputError(message) from error
        try:
            gpus = self.gpus
            if gpus is None:
                gpus = min(1, ray.cluster_resources().get("GPU", 0))
            tasks = _Tasks(ray, function, cpus=self.cpus, gpus=gpus, on_event=on_event)
            try:
                yield from tasks.outcomes(jobs, self.workers)
            finally:
                tasks.stop()
        finally:
            if starts_connection:
                ray.shutdown()


class _Tasks:
    """The jobs of one call as Ray tasks."""

    def __init__(
        self,
        ray: ModuleType,
        function: Any,
        *,
        cpus: float,
        gpus: float,
        on_event: EventHandler | None,
    ) -> None:
        self.ray = ray
        self.on_event = on_event
        self.function = ray.put(function)  # sent to each machine once
        # Ray's own retries would neither count as ours nor be reported.
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run_job)
        self.mailbox = ray.remote(num_cpus=0)(_Mailbox).remote() if on_event else None
        self.folder = str(Path.cwd())
        self.running: dict[Any, tuple[Any, int]] = {}

    def outcomes(self, jobs: Iterable[Any], limit: int | None) -> Iterator[Outcome[Any, Any]]:
        """Submit jobs, at most ``limit`` at the same time, and yield their outcomes."""
        left = iter(jobs)
        while True:
            while limit is None or len(self.running) < limit:
                job = next(left, _NOTHING)
                if job is _NOTHING:
                    break
                self._submit(job, 1)
            if not self.running:
                return
            done, _ = self.ray.wait(list(self.running), timeout=_INTERVAL)
            self._forward_events()
            for ref in done:
                job, attempts = self.running.pop(ref)
                try:
                    result = self.ray.get(ref)
                except self.ray.exceptions.RayTaskError as error:
                    message = (
                        f"A Ray worker could not load its work: {_last_line(error)}. Every machine "
                        "needs the packages that are imported on this one."
                    )
                    result = Failed(LoraAnalysisError(message))
                except self.ray.exceptions.RayError as error:  # its process or machine is gone
                    message = f"Ray lost the worker of {job}: {_last_line(error)}"
                    result = Failed(LostWorkerError(message))
                if not isinstance(result, Failed):
                    yield Outcome(job, result, None, attempts)
                elif is_final(result.error, attempts):
                    yield Outcome(job, None, result.error, attempts)
                else:
                    self._submit(job, attempts + 1)
                    if self.on_event:
                        self.on_event(Retried(job, result.error))

    def stop(self) -> None:
        """Interrupt running tasks, and wait a moment while they release their locks."""
        left = list(self.running)
        with suppress(Exception):  # the cluster may be gone as well
            for ref in left:
                self.ray.cancel(ref)
            if left:
                _, left = self.ray.wait(left, num_returns=len(left), timeout=_PATIENCE)
            for ref in left:
                self.ray.cancel(ref, force=True)
            if self.mailbox is not None:
                self.ray.kill(self.mailbox)

    def _submit(self, job: Any, attempts: int) -> None:
        ref = self.task.remote(self.function, job, self.mailbox, self.folder)
        self.running[ref] = job, attempts

    def _forward_events(self) -> None:
        """Send new events of the work to the caller."""
        if self.on_event is None or self.mailbox is None:
            return
        try:
            events = self.ray.get(self.mailbox.take.remote())
        except self.ray.exceptions.RayActorError:  # it went with its machine; the work goes on
            self.mailbox = None
            return
        for event in events:
            self.on_event(event)


_NOTHING = object()


class _Mailbox:
    """Events of the work until the caller fetches them; lives in a process of Ray's."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, event: Any) -> None:
        self.events.append(event)

    def take(self) -> list[Any]:
        events, self.events = self.events, []
        return events


def _run_job(function: Any, job: Any, mailbox: Any, folder: str) -> Any:
    """Do one job in a process of Ray's, in the caller's working folder if it exists there."""
    import ray

    with suppress(OSError):
        os.chdir(folder)
    last = None

    def send_event(event: object) -> None:
        nonlocal last
        if mailbox is not None:
            last = mailbox.put.remote(event)

    result = attempt(function, job, send_event)
    if last is not None:
        with suppress(ray.exceptions.RayError):
            ray.get(last)  # so that all events arrive before the job is done
    return result


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _import_ray() -> ModuleType:
    """Return Ray, set up to send no usage statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    require_package("ray", "ray", "The executor 'ray'")
    import_module("ray.exceptions")
    return import_module("ray")
