"""Work on the machines of a Ray cluster, or on a local one started for it (extra ``ray``)."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import InputError, LoraAnalysisError, LostWorkerError, MissingExtraError
from lora_analysis.execution.protocol import (
    Cell,
    Failed,
    Outcome,
    Result,
    Retried,
    Tell,
    Work,
    attempt,
    is_final,
)

if TYPE_CHECKING:
    from types import ModuleType

# Seconds between two looks for events while no cell ends.
_INTERVAL = 0.2
_PATIENCE = 5.0  # seconds that work is given to end when it is interrupted


class RayExecutor:
    """Work wherever a Ray cluster has room; Ray accounts for CPUs and GPUs and places the cells.

    Parameters
    ----------
    address
        Of the cluster: ``"auto"``, ``"host:6379"`` or ``"ray://host:10001"``; by default
        ``$RAY_ADDRESS``, and without it a cluster of this machine alone, ended afterwards. A
        connection that is open already is used as it is, and left open.
    workers
        How many cells may be under way at once; by default as many as the cluster has room for.
    cpus, gpus
        What one cell takes. ``gpus`` may be a fraction; None takes one where the cluster has any.

    Raises
    ------
    MissingExtraError
        Ray is not installed. When the work begins, ``InputError`` where the cluster cannot be
        reached.

    Notes
    -----
    Every machine needs this package, in the same version, and the folders that the work reads
    and writes at the same paths; relative ones start from the caller's working folder. A cell
    whose process or machine is lost is tried again elsewhere.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float | None = None,
    ) -> None:
        _ray()
        self.address = address
        self.workers = workers
        self.cpus = cpus
        self.gpus = gpus

    def map(
        self, function: Work[Cell, Result], cells: Iterable[Cell], *, tell: Tell | None = None
    ) -> Generator[Outcome[Cell, Result], None, None]:
        """Yield the outcome of every cell; see `protocol.Executor`."""
        ray = _ray()
        with self._connected(ray):
            gpus = self.gpus
            if gpus is None:
                gpus = min(1, ray.cluster_resources().get("GPU", 0))
            run = _Run(ray, function, cpus=self.cpus, gpus=gpus, tell=tell)
            try:
                yield from run.outcomes(cells, self.workers)
            finally:
                run.stop()

    @contextmanager
    def _connected(self, ray: ModuleType) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        address = self.address or os.environ.get("RAY_ADDRESS")
        # A cluster of one's own has as many places as workers were asked for.
        own = {} if address else {"num_cpus": self.workers, "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = (
                f"Cannot connect to a Ray cluster at {address or 'this machine'}: "
                f"{_last_line(error)} Is it running, reachable from here, of the same version of "
                "Ray and Python, and is its token (RAY_AUTH_TOKEN), if it has one, set?"
            )
            raise InputError(message) from error
        try:
            yield
        finally:
            ray.shutdown()


class _Run:
    """The cells of one call, as Ray tasks under way."""

    def __init__(
        self, ray: ModuleType, function: Any, *, cpus: float, gpus: float, tell: Tell | None
    ) -> None:
        self.ray = ray
        self.tell = tell
        self.function = ray.put(function)  # sent to each machine once
        # Ray's own retries would count neither with ours nor be told of.
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_do)
        self.mailbox = ray.remote(num_cpus=0)(_Mailbox).remote() if tell else None
        self.folder = str(Path.cwd())
        self.under_way: dict[Any, tuple[Any, int]] = {}

    def outcomes(self, cells: Iterable[Any], limit: int | None) -> Iterator[Outcome[Any, Any]]:
        """Submit cells, as many at once as allowed, and yield how they end."""
        left = iter(cells)
        while True:
            while limit is None or len(self.under_way) < limit:
                cell = next(left, _NOTHING)
                if cell is _NOTHING:
                    break
                self._submit(cell, 1)
            if not self.under_way:
                return
            done, _ = self.ray.wait(list(self.under_way), timeout=_INTERVAL)
            self._pass_on()
            for ref in done:
                cell, attempts = self.under_way.pop(ref)
                result = self._result(ref, cell)
                if not isinstance(result, Failed):
                    yield Outcome(cell, result, None, attempts)
                elif is_final(result.error, attempts):
                    yield Outcome(cell, None, result.error, attempts)
                else:
                    self._submit(cell, attempts + 1)
                    if self.tell:
                        self.tell(Retried(cell, result.error))

    def stop(self) -> None:
        """Interrupt what is still under way, and wait a moment while it gives up its locks."""
        left = list(self.under_way)
        with suppress(Exception):  # the cluster may be gone as well
            for ref in left:
                self.ray.cancel(ref)
            if left:
                _, left = self.ray.wait(left, num_returns=len(left), timeout=_PATIENCE)
            for ref in left:
                self.ray.cancel(ref, force=True)
            if self.mailbox is not None:
                self.ray.kill(self.mailbox)

    def _submit(self, cell: Any, attempts: int) -> None:
        ref = self.task.remote(self.function, cell, self.mailbox, self.folder)
        self.under_way[ref] = cell, attempts

    def _result(self, ref: Any, cell: Any) -> Any:
        """Return what the task returned, or that its process or machine is gone."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:  # the work could not be loaded there
            message = (
                f"A Ray worker could not load its work: {_last_line(error)}. Every machine needs "
                "the packages that are imported here."
            )
            return Failed(LoraAnalysisError(message))
        except self.ray.exceptions.RayError as error:
            message = f"Ray lost the worker of {cell}: {_last_line(error)}"
            return Failed(LostWorkerError(message))

    def _pass_on(self) -> None:
        """Tell the caller what the work has told since."""
        if self.tell is None or self.mailbox is None:
            return
        try:
            events = self.ray.get(self.mailbox.take.remote())
        except self.ray.exceptions.RayActorError:  # it went with its machine; the work goes on
            self.mailbox = None
            return
        for event in events:
            self.tell(event)


_NOTHING = object()


class _Mailbox:
    """What the work tells, kept until the caller asks for it; lives in a process of Ray's."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, event: Any) -> None:
        self.events.append(event)

    def take(self) -> list[Any]:
        events, self.events = self.events, []
        return events


def _do(function: Any, cell: Any, mailbox: Any, folder: str) -> Any:
    """Do one cell in a process of Ray's, in the caller's working folder where it is there too."""
    import ray

    with suppress(OSError):
        os.chdir(folder)
    last = None

    def tell(event: object) -> None:
        nonlocal last
        if mailbox is not None:
            last = mailbox.put.remote(event)

    result = attempt(function, cell, tell)
    if last is not None:
        with suppress(ray.exceptions.RayError):
            ray.get(last)  # so that all is told before the cell is done
    return result


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> ModuleType:
    """Return Ray, told beforehand to report to nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import_module("ray.exceptions")
        return import_module("ray")
    except ImportError as error:
        message = "The executor 'ray' needs Ray: pip install 'lora-analysis[ray]'."
        raise MissingExtraError(message) from error
