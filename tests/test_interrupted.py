"""Writing that is killed at every file operation, or finds no room, loses and mixes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from factories import low_rank_update

from lora_analysis import LowRankUpdate, read_adapter, write_adapter
from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.errors import InputError, OccupiedError, OutputError
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.outputs import output_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends processes as POSIX does")

# Forks once per point, so that the imports are paid once, and ends each child at its point.
KILL_AT_EVERY_POINT = """
import os, signal, sys
from lora_analysis import read_adapter
from lora_analysis.formats import write_adapter

source, target, kind = sys.argv[1:]
adapter = read_adapter(source)
adapter = type(adapter)(dict(adapter), label=adapter.label)  # its tensors read by now

def write_until(point):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            seen += 1
            if seen > point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    write_adapter(adapter, target, format=kind)

point = 0
while True:
    child = os.fork()
    if not child:
        write_until(point)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    point += 1
    print(point, flush=True)
    sys.stdin.readline()
"""


def adapter_of(scale: float, rank: int) -> Adapter:
    rng = np.random.default_rng(rank)
    updates = {
        name: LowRankUpdate(
            name=name,
            A=rng.standard_normal((rank, 12)).astype(np.float32),
            B=rng.standard_normal((10, rank)).astype(np.float32),
            scale=scale,
        )
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    }
    return Adapter(updates, label=f"r{rank}", provenance=Provenance(base_model="some/base"))


def is_the_same(found: Adapter, wanted: Adapter) -> bool:
    return set(found) == set(wanted) and all(
        np.allclose(found[name].delta_weight(), wanted[name].delta_weight(), rtol=1e-5)
        for name in wanted
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "mlx", "kohya", "loralib"])
def test_an_adapter_is_the_old_one_or_the_new_one_wherever_its_writer_dies(
    tmp_path: Path, kind: str
) -> None:
    old, new = adapter_of(2.0, 3), adapter_of(0.5, 2)
    source = write_adapter(new, tmp_path / "source")
    target = tmp_path / ("target" if kind in ("peft", "mlx") else "target.safetensors")
    wanted = [_through(one, target, kind) for one in (new, old)][::-1]
    points, seen = 0, set()
    with subprocess.Popen(
        [sys.executable, "-c", KILL_AT_EVERY_POINT, source, target, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in child.stdout:
            points += 1
            seen.add(_state(target, wanted))
            write_adapter(old, target, format=kind)
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0
    assert _state(target, wanted) == "new"
    assert points >= 3
    assert "old" in seen
    # Weights and config are two files: between them there is no adapter, never a mixed one.
    assert seen <= ({"old", "new", "none"} if kind in ("peft", "mlx") else {"old", "new"})


def _through(adapter: Adapter, target: Path, kind: str) -> Adapter:
    """Return what the format makes of an adapter, with its tensors read."""
    read = read_adapter(write_adapter(adapter, target, format=kind))
    return Adapter(dict(read), label=read.label)


def _state(target: Path, wanted: list[Adapter]) -> str:
    try:
        found = read_adapter(target)
    except InputError:
        return "none"
    if any(update.scale is None for update in found.values()):
        return "none"  # weights alone: what they are multiplied by is not known, and said so
    for name, one in zip(("old", "new"), wanted, strict=True):
        if is_the_same(found, one):
            return name
    return "mixed"


# --- no room ----------------------------------------------------------------------------------

# What a full disk says, from a limit that needs no disk of its own.
WITHOUT_ROOM = """
import resource, sys
from lora_analysis.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.argv[0] = "lora-analysis"
main()
"""


def run_without_room(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "verb", [("resize", "--rank", 1), ("convert", "--to", "mlx"), ("convert", "--to", "kohya")]
)
def test_without_room_the_old_file_stays_and_one_line_says_so(
    tmp_path: Path, verb: tuple[object, ...]
) -> None:
    source = write_adapter(adapter_of(2.0, 3), tmp_path / "source")
    name, *options = verb
    target = tmp_path / ("target.safetensors" if "kohya" in options else "target")
    made = subprocess.run(
        [sys.executable, "-m", "lora_analysis", *map(str, (name, source, *options)), "-o", target],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    done = run_without_room(name, source, *options, "-o", target, "--force")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "could not be written: File too large" in done.stderr
    after = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert after == before


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        put_together(disk / "out", {"weights": b"old"})
        with pytest.raises(OutputError, match=r"No space left.*untouched"):
            put_together(disk / "out", {"config": b"new", "weights": bytes(1 << 20)})
        assert contents_of(disk / "out") == {"weights": b"old"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def put_together(folder: Path, contents: dict[str, bytes]) -> None:
    with output_folder(folder, kind="adapter", verb="convert") as staging:
        for name, content in contents.items():
            write_atomic(staging / name, content)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path, old = tmp_path / "file[1]", time.time() - 7200
    left = {
        "abandoned": f".file[1].{gone.pid}-0123abcd.tmp",
        "young": f".file[1].{gone.pid}-4567abcd.tmp",
        "of a living process": f".file[1].{os.getpid()}-0123abcd.tmp",
        "of another file": f".other.{gone.pid}-0123abcd.tmp",
    }
    for what, name in left.items():
        (tmp_path / name).write_bytes(b"")
        if what != "young":
            os.utime(tmp_path / name, (old, old))
    write_atomic(path, b"new")
    del left["abandoned"]
    assert {one.name for one in tmp_path.iterdir()} == {"file[1]", *left.values()}


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OccupiedError, match=r"file is a file, and the output is a folder"):
        write_adapter(adapter_of(1.0, 2), tmp_path / "file")


# --- the user stops it ------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupting_a_command_ends_it_with_130_and_no_traceback(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in "abcdef":
        many = {
            f"layers.{i}.q_proj": low_rank_update(rng, 64, 64, 8, name=f"layers.{i}.q_proj")
            for i in range(6)
        }
        write_adapter(Adapter(many, label=label), tmp_path / label)
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "lora_analysis", "report", tmp_path, "-o", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        while not any(out.rglob("figures/*")) and child.poll() is None:
            time.sleep(0.01)  # until it is at work: drawing the others takes it seconds
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        _, told = child.communicate()
    assert child.returncode == 130
    assert "Traceback" not in told
    assert "Interrupted" in told
    assert not (out / "report.html").exists()
