"""Ray over a network: head and worker in network namespaces of their own, as two machines."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

HEAD, WORKER, PORT = "10.77.1.1", "10.77.1.2", "6399"
DRIVER = """
import sys
import executor_work as work
from lora_analysis.execution.cluster import RayExecutor

if __name__ == "__main__":
    outcomes = list(RayExecutor(address=sys.argv[1]).map(work.address, range(2)))
    print(sorted(one.result for one in outcomes))
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    pytest.importorskip("ray", reason="Ray is not installed")
    if not (sys.platform == "linux" and shutil.which("ip") and os.geteuid() == 0):
        pytest.skip("network namespaces need Linux, ip and root")
    mark = secrets.token_hex(2)
    one, two, end, other = f"la-{mark}-1", f"la-{mark}-2", f"la{mark}a", f"la{mark}b"
    try:
        _ip("netns", "add", one)
        _ip("netns", "add", two)
        _ip("link", "add", end, "type", "veth", "peer", "name", other)
        for name, device, address in ((one, end, HEAD), (two, other, WORKER)):
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for up in ("lo", device):
                _ip("-n", name, "link", "set", up, "up")
    except subprocess.CalledProcessError as error:
        _delete(one, two)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield one, two
    _delete(one, two)


def _delete(*names: str) -> None:
    for name in names:
        # Whatever still runs in a namespace was started by this test.
        held = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False)
        for number in held.stdout.split():
            subprocess.run(["kill", "-9", number.decode()], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_jobs_are_done_on_both_machines(
    machines: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    (tmp_path / "meeting").mkdir()
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    ray += ["--disable-usage-stats"]
    address = f"{HEAD}:{PORT}"
    # The sockets of a longer path would have too long a name.
    store = Path("/tmp") / f"la-{secrets.token_hex(3)}"
    starts = (
        [*ray, "--head", "--node-ip-address", HEAD, "--port", PORT, "--temp-dir", str(store)],
        [*ray, "--node-ip-address", WORKER, "--address", address],
    )
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, store, ignore_errors=True)
        for name, command in zip(machines, starts, strict=True):
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *command], stdout=log, stderr=log
            )
            stack.callback(process.wait, timeout=30)
            stack.callback(process.terminate)
            _wait_for(tmp_path / f"{name}.log", process)
        done = subprocess.run(
            ["ip", "netns", "exec", machines[0], sys.executable, script, address],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stdout.strip() == f"['{HEAD}', '{WORKER}']", done.stderr


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if b"Ray runtime started" in log.read_bytes():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"Ray did not start: {log.read_text()[-2000:]}")
