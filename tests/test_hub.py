"""Names that lead to a hub, against one on loopback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factories import adapter
from fake_hub import FakeHub, serving
from reference import assert_close
from safetensors.numpy import save
from test_cli import call, document

from lora_analysis import approximate_fine_tune, open_base, read_fine_tune
from lora_analysis.errors import InputError, MissingExtraError, SourceError
from lora_analysis.formats import find_adapters, read_adapter, write_adapter
from lora_analysis.storage import hub as hub_module
from lora_analysis.storage import hub_client
from lora_analysis.storage.source_names import HubName, hub_name

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process asks, with a cache and a working folder of its own."""
    # A request that an earlier test gave up may still hold a connection of the shared client.
    importlib.import_module("huggingface_hub").close_session()
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield served


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    return {f"{under}{one.name}": one.read_bytes() for one in folder.iterdir() if one.is_file()}


@pytest.fixture
def stored(rng: np.random.Generator, tmp_path: Path) -> dict[str, bytes]:
    """The files of a PEFT adapter."""
    return files_of(write_adapter(adapter(rng, label="x"), tmp_path / "stored"))


OTHERS = {
    "README.md": b"# words",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "optimizer.pt": b"momentum",
    "adapter_model.bin": b"pickle",
    "model-00001-of-00002.safetensors": b"a whole model",
}


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf://o/n", HubName("o/n")),
        ("hf://o/n@v1.0", HubName("o/n", "v1.0")),
        ("hf://o/n@refs/pr/3/sub", HubName("o/n", "refs/pr/3", "sub")),
        ("hf://o/n@a%2Fb/sub/two/", HubName("o/n", "a/b", "sub/two")),
        ("hf://o.x/n-1_2/adapter.safetensors", HubName("o.x/n-1_2", None, "adapter.safetensors")),
        ("o/n", HubName("o/n")),
        ("o/n/m", None),
        ("./o/n", None),
        ("../n", None),
        ("/o/n", None),
        ("runs/a.safetensors", None),
        ("runs/a.bin", None),
        ("o/n@v1", None),
        ("n", None),
    ],
)
def test_a_source_names_a_repository_or_none(source: str, name: HubName | None) -> None:
    found = hub_name(source)
    assert (found and (found.repo, found.revision, found.inside)) == (
        name and (name.repo, name.revision, name.inside)
    )


@pytest.mark.parametrize("source", ["hf://", "hf://n", "hf://o/n/../x", "hf://o/n@/x", "hf:///o/n"])
def test_an_address_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(SourceError, match="not an address of the form"):
        hub_name(source)


# --- adapters ---------------------------------------------------------------------------------


def test_an_adapter_is_read_from_a_hub_with_its_commit_pinned(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.commit("someone/some-lora", stored | OTHERS)
    found = read_adapter("hf://someone/some-lora")
    local = read_adapter(tmp_path / "stored")
    assert list(found) == list(local)
    for name in local:
        assert_close(found[name].delta_weight(), local[name].delta_weight())
    assert found.label == "some-lora"
    assert found.provenance.revision == commit
    assert found.provenance.address == f"hf://someone/some-lora@{commit}"
    assert found.provenance.location == found.provenance.address
    assert found.provenance.sha256 == local.provenance.sha256
    assert hub.fetched() == set(stored)  # and nothing of the others


def test_a_bare_name_is_a_repository_unless_something_local_has_it(
    hub: FakeHub, stored: dict[str, bytes], rng: np.random.Generator
) -> None:
    hub.commit("someone/some-lora", stored)
    assert read_adapter("someone/some-lora").provenance.address
    hub.requests.clear()
    write_adapter(adapter(rng, rank=1, label="local"), Path("someone/some-lora"))
    found = read_adapter("someone/some-lora")
    assert found.provenance.address is None
    assert found.provenance.rank == 1
    assert not hub.requests


def test_revisions_and_sub_folders_are_those_asked_for(
    hub: FakeHub, rng: np.random.Generator, tmp_path: Path
) -> None:
    commits = {}
    for revision, rank in (("main", 2), ("v2", 3)):
        folder = write_adapter(adapter(rng, rank=rank), tmp_path / revision)
        inside = files_of(folder, "checkpoint-7/") | files_of(folder, "other/")
        commits[revision] = hub.commit("o/n", inside, revision)
    one = read_adapter("hf://o/n@v2/checkpoint-7")
    assert one.provenance.rank == 3
    assert one.label == "n/checkpoint-7"
    assert one.provenance.address == f"hf://o/n@{commits['v2']}/checkpoint-7"
    assert not {name for name in hub.fetched() if name.startswith("other/")}
    pinned = read_adapter(f"hf://o/n@{commits['main']}/other")
    assert pinned.provenance.rank == 2
    file = read_adapter("hf://o/n/other/adapter_model.safetensors")
    assert file.provenance.rank == 2


def test_several_adapters_of_a_repository_are_found_by_their_addresses(
    hub: FakeHub, rng: np.random.Generator, tmp_path: Path
) -> None:
    files = {}
    for rank in (2, 3):
        files |= files_of(
            write_adapter(adapter(rng, rank=rank), tmp_path / f"r{rank}"), f"r{rank}/"
        )
    commit = hub.commit("o/n", files)
    refs = find_adapters("o/n")
    assert [ref.source for ref in refs] == [f"hf://o/n@{commit}/r{rank}" for rank in (2, 3)]
    assert [read_adapter(ref).provenance.address for ref in refs] == [ref.source for ref in refs]
    assert read_adapter(refs[1].source).provenance.rank == 3
    with pytest.raises(SourceError, match=f"holds 2 adapters.*hf://o/n@{commit}/r2") as caught:
        read_adapter("o/n")
    assert str(tmp_path) not in str(caught.value)


def test_one_of_several_in_a_file_is_chosen_by_name(
    hub: FakeHub, stored: dict[str, bytes], rng: np.random.Generator
) -> None:
    tensors = {
        f"base_model.model.q_proj.lora_{role}.{name}.weight": rng.standard_normal(shape)
        for name in ("one", "two")
        for role, shape in (("A", (4, 8)), ("B", (6, 4)))
    }
    hub.commit("o/n", stored | {"adapter_model.safetensors": save(tensors)})
    first, second = find_adapters("o/n")
    assert second.source.endswith("#two")
    for source in ("o/n#two", second, second.source):
        (update,) = read_adapter(source).values()
        assert_close(update.A, tensors["base_model.model.q_proj.lora_A.two.weight"])
    assert first.name == "one"


def test_a_path_object_is_never_a_repository(hub: FakeHub, stored: dict[str, bytes]) -> None:
    hub.commit("o/n", stored)
    with pytest.raises(SourceError, match="no file or folder"):
        read_adapter(Path("o/n"))
    assert not hub.requests


def test_torch_files_are_fetched_where_pickles_are_allowed_only(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    import io

    import torch
    from safetensors.torch import load

    stream = io.BytesIO()
    torch.save(load(stored["adapter_model.safetensors"]), stream)
    files = {
        "adapter_config.json": stored["adapter_config.json"],
        "adapter_model.bin": stream.getvalue(),
        "optimizer.pt": b"momentum",
    }
    hub.commit("o/n", files)
    with pytest.raises(InputError) as caught:
        read_adapter("o/n")
    assert str(tmp_path) not in str(caught.value)
    assert "adapter_model.bin" not in hub.fetched()
    assert len(read_adapter("o/n", allow_pickle=True)) == 4
    assert hub.fetched() == {"adapter_config.json", "adapter_model.bin"}


def test_other_containers_are_fetched_where_there_is_no_safetensors_file(
    hub: FakeHub, stored: dict[str, bytes]
) -> None:
    hub.commit("o/gguf", {"adapter.gguf": b"GGUF", "notes.md": b""})
    with pytest.raises(InputError):
        read_adapter("o/gguf")
    assert "adapter.gguf" in hub.fetched()
    hub.requests.clear()
    hub.commit("o/both", stored | {"adapter.gguf": b"GGUF"})
    read_adapter("o/both")
    assert hub.fetched() == set(stored)


def test_what_was_fetched_is_read_offline(
    hub: FakeHub, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("o/n", stored)
    read_adapter("o/n")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_adapter("o/n").provenance.revision == commit
    assert not hub.requests


def test_errors_of_damaged_files_name_the_address_and_not_the_cache(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    half = stored["adapter_model.safetensors"][:300]
    commit = hub.commit("o/n", stored | {"adapter_model.safetensors": half})
    with pytest.raises(InputError, match=f"hf://o/n@{commit}/adapter_model.safetensors") as caught:
        read_adapter("o/n")
    assert str(tmp_path) not in str(caught.value)


def test_what_cannot_be_had_is_said_in_one_line(
    hub: FakeHub, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("o/gated", stored)
    hub.commit("o/broken", stored)
    hub.commit("o/n", stored)
    hub.gated, hub.broken = {"o/gated"}, {"o/broken"}
    table = [
        ("hf://o/none", "hf://o/none does not exist, or is private"),
        ("o/none", r"There is no file or folder 'o/none'\. On the hub: hf://o/none does not"),
        ("hf://o/gated", "is gated. Accept its terms"),
        ("hf://o/n@v9", "hf://o/n has no revision 'v9'"),
        ("hf://o/n/nowhere", "has no 'nowhere'"),
        ("hf://o/broken", "hf://o/broken"),
    ]
    for source, said in table:
        with pytest.raises(SourceError, match=said) as caught:
            read_adapter(source)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"not in the local cache.*HF_HUB_OFFLINE is set"):
        read_adapter("hf://o/new")


def test_without_the_extra_the_error_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-analysis\[hf\]'"):
        read_adapter("hf://o/n")
    with pytest.raises(SourceError, match=r"no file or folder 'o/n'.*lora-analysis\[hf\]"):
        read_adapter("o/n")
    with pytest.raises(SourceError, match="no file or folder"):
        read_adapter("/o/n")


def test_only_the_files_of_the_adapter_are_fetched_from_a_model_with_one(
    hub: FakeHub, stored: dict[str, bytes]
) -> None:
    model = {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 999,
        "consolidated.safetensors": b"again" * 999,
        "unet/config.json": b"{ }",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"more" * 999,
        "checkpoint-5/model-00001-of-00002.safetensors": b"more" * 999,
    }
    hub.commit("o/both", stored | model | OTHERS)
    read_adapter("o/both")
    assert hub.fetched() == {*stored, "config.json", "unet/config.json"}


@pytest.mark.parametrize(
    ("paths", "allow_pickle", "chosen"),
    [
        # What the config describes, and nothing else of the folder
        ("adapter_config.json adapter_model.safetensors other.safetensors", False, [0, 1]),
        ("adapter_config.json adapters.safetensors 0000100_adapters.safetensors", False, [0, 1, 2]),
        ("adapter_config.json adapter_model.safetensors adapter_model.bin", True, [0, 1]),
        ("adapter_config.json adapter_model.bin x.bin optimizer.bin", True, [0, 1]),
        ("adapter_config.json adapter_model.bin", False, [0]),
        (
            "adapter_config.json adapter_model.safetensors.index.json "
            "adapter_model-00001-of-00002.safetensors adapter_model-00002-of-00002.safetensors",
            False,
            [0, 1, 2, 3],
        ),
        # Files without a config
        ("a.safetensors b.safetensors c.ckpt README.md", False, [0, 1]),
        ("lora.safetensors config.json model.safetensors", False, [0, 1]),
        ("lora.safetensors model.safetensors", False, [0, 1]),  # by its name alone it may be one
        ("config.json model.safetensors x.npz", False, [0, 1]),  # that is what was asked about
        ("x.npz my-lora-f16.gguf model-Q4.gguf", False, [0, 1]),
        ("a/adapter_config.json a/adapter_model.safetensors a/model.safetensors b/x.safetensors",
         False, [0, 1, 3]),
    ],
)  # fmt: skip
def test_files_are_chosen_by_name(paths: str, allow_pickle: bool, chosen: list[int]) -> None:
    listed = paths.split()
    selected = hub_module.select_adapter_files(listed, allow_pickle=allow_pickle)
    assert sorted(selected) == sorted(listed[n] for n in chosen)


@pytest.mark.parametrize("states_sizes", [True, False])
@pytest.mark.parametrize("limit", ["MAX_HUB_ADAPTER_BYTES", "MAX_HUB_FILES", "disk"])
def test_sizes_are_judged_before_anything_is_fetched(
    hub: FakeHub,
    stored: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    states_sizes: bool,
) -> None:
    hub.commit("o/n", stored)
    hub.states_sizes = states_sizes
    if limit == "disk":
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(hub_client.shutil, "disk_usage", lambda _: usage)
    else:
        for module in (hub_module, hub_client):
            monkeypatch.setattr(module, limit, 1, raising=False)
    messages = {
        "MAX_HUB_ADAPTER_BYTES": r"the 2 files to fetch have .* the largest is 'adapter_model.safe",
        "MAX_HUB_FILES": r"2 files to fetch are too many \(limit 1\)",
        "disk": r"are to be fetched, and the disk of the cache .* has 0\.00 GB free",
    }
    with pytest.raises(SourceError, match=messages[limit]):
        read_adapter("o/n")
    assert not hub.fetched()


def test_a_configuration_without_end_is_not_fetched(
    hub: FakeHub, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "MAX_INDEX_BYTES", 100)
    hub.commit("o/n", stored | {"config.json": b" " * 101})
    with pytest.raises(InputError, match=r"config\.json: \d+ bytes are too many"):
        read_adapter("o/n")
    assert not hub.fetched()


@pytest.mark.parametrize("silent", ["/api/models/", "/resolve/"])
@pytest.mark.parametrize("retries", [True, False])
def test_a_hub_that_never_answers_is_given_up(
    hub: FakeHub,
    stored: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    silent: str,
    retries: bool,
) -> None:
    # Either a request ends and is repeated, or it alone takes longer than all may take.
    monkeypatch.setattr(hub_client, "HUB_TIMEOUT", 0.05 if retries else 1.5)
    monkeypatch.setattr(hub_client, "HUB_ANSWER_SECONDS", 0.3)
    hub.commit("o/n", stored)
    hub.silent = {silent}
    with pytest.raises(SourceError, match=r"o/n.* (could not be fetched|cannot be reached)"):
        read_adapter("o/n")


def test_what_is_cached_is_read_where_the_hub_does_not_answer(
    hub: FakeHub, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("o/n", stored)
    read_adapter("o/n")
    monkeypatch.setattr(hub_client, "HUB_TIMEOUT", 0.05)
    hub.silent = {"/"}
    assert read_adapter("o/n").provenance.revision == commit
    assert read_adapter(f"hf://o/n@{commit}").provenance.revision == commit


def test_a_repository_that_changes_while_it_is_fetched_is_refused(
    hub: FakeHub, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("o/n", stored)
    check = hub_client._check_sizes

    def push(*given: object) -> None:
        check(*given)
        hub.commit("o/n", stored | {"README.md": b"changed"})

    monkeypatch.setattr(hub_client, "_check_sizes", push)
    with pytest.raises(SourceError, match="changed while it was fetched"):
        read_adapter("o/n")


def test_a_hub_cannot_name_files_outside_the_cache(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit("o/n", stored | {"../../../../up.safetensors": b"x", "/abs.safetensors": b"x"})
    read_adapter("o/n")
    assert hub.fetched() == set(stored)


# --- bases ------------------------------------------------------------------------------------

SHARDS = {"layers.0.q_proj.weight": "one.safetensors", "layers.1.q_proj.weight": "two.safetensors"}


def sharded(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    weights = {name: rng.standard_normal((6, 5)).astype(np.float32) for name in SHARDS}
    files = {shard: save({name: weights[name]}) for name, shard in SHARDS.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": SHARDS}).encode()
    files["config.json"] = b'{"model_type": "llama"}'
    return weights, files


def test_a_base_is_opened_from_a_hub_by_its_index(hub: FakeHub, rng: np.random.Generator) -> None:
    weights, files = sharded(rng)
    others = {"consolidated.safetensors": b"twice", "original/one.safetensors": b"", **OTHERS}
    commit = hub.commit("org/base-1b", files | others)
    base = open_base("org/base-1b")
    assert base.label == "base-1b"
    assert base.model_type == "llama"
    assert base.address == f"hf://org/base-1b@{commit}"
    for name, W in weights.items():
        assert_close(base.weight(name.removesuffix(".weight")).array(), W)
    assert hub.fetched() == set(files)


@pytest.mark.parametrize("gives_parts", [True, False])
def test_only_the_shards_that_are_read_are_fetched(
    hub: FakeHub, rng: np.random.Generator, gives_parts: bool
) -> None:
    weights, files = sharded(rng)
    hub.commit("org/base", files)
    hub.gives_parts = gives_parts
    base = open_base("org/base")
    shards = set(SHARDS.values())
    weight = base.weight("layers.1.q_proj")
    assert hub.fetched() & shards == (set() if gives_parts else shards)
    assert_close(weight.array(), weights["layers.1.q_proj.weight"])
    assert_close(weight.array(), weights["layers.1.q_proj.weight"])
    assert hub.fetched() & shards == ({"two.safetensors"} if gives_parts else shards)
    again = open_base("org/base")  # one shard is in the cache, the other is not
    for name, W in weights.items():
        assert_close(again.stored_tensor(name), W)


def test_a_shard_is_not_asked_for_where_the_hub_may_not_be(
    hub: FakeHub, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, files = sharded(rng)
    hub.commit("org/base", files)
    base = open_base("org/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set") as caught:
        base.weight("layers.1.q_proj").array()
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        open_base("org/base")


def test_a_shard_that_lacks_what_the_index_says_is_refused(
    hub: FakeHub, rng: np.random.Generator
) -> None:
    _, files = sharded(rng)
    files["two.safetensors"] = files["one.safetensors"]
    hub.commit("org/base", files)
    with pytest.raises(InputError, match=r"said to be in two\.safetensors, which"):
        open_base("org/base")
    files["two.safetensors"] = b"half"
    hub.commit("org/cut", files)
    with pytest.raises(InputError, match="4 bytes are too few"):
        open_base("org/cut")


def test_a_base_of_one_file_or_in_a_sub_folder_is_opened(
    hub: FakeHub, rng: np.random.Generator
) -> None:
    W = rng.standard_normal((6, 5)).astype(np.float32)
    one = save({"layers.0.q_proj.weight": W})
    hub.commit("o/single", {"model.safetensors": one, "model.fp16.safetensors": b"twice"})
    assert open_base("hf://o/single").names == ["layers.0.q_proj.weight"]
    assert hub.fetched() == {"model.safetensors"}
    hub.commit("o/nested", {"unet/weights.safetensors": one, "vae/weights.safetensors": b""})
    assert open_base("hf://o/nested/unet").names == ["layers.0.q_proj.weight"]
    file = open_base("hf://o/nested/unet/weights.safetensors")
    assert file.label == "nested"
    assert not any(name.startswith("vae/") for name in hub.fetched())


def test_a_fine_tune_and_its_base_come_from_a_hub(hub: FakeHub, rng: np.random.Generator) -> None:
    weights, files = sharded(rng)
    base = hub.commit("org/base", files)
    changed = {name: W + 1 for name, W in weights.items()}
    files = {"model.safetensors": save(changed), "config.json": files["config.json"]}
    tuned = hub.commit("me/tuned", files)
    update = read_fine_tune("me/tuned", "org/base")
    assert update.provenance.address == f"hf://me/tuned@{tuned}"
    assert update.provenance.revision == tuned
    # As a source, and the other way round: the model in shards is the fine-tune then.
    for source, other, step in (("me/tuned", "org/base", 1.0), ("org/base", "hf://me/tuned", -1.0)):
        adapter = read_adapter(find_adapters(source, base=other)[0], base=other)
        assert adapter.label == source.partition("/")[2]
        assert adapter.provenance.address == f"hf://{source}@{tuned if step > 0 else base}"
        assert adapter.provenance.read_options["base"] == other
        for values in adapter.values():
            assert_close(values.delta_weight(), step, atol=1e-6)
    written = write_adapter(
        approximate_fine_tune("me/tuned", "hf://org/base", rank=1).adapter, "lora"
    )
    config = json.loads((written / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", base)


def test_a_base_of_many_files_is_asked_for_by_file(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.commit("o/quants", {f"m-Q{bits}.gguf": b"GGUF" for bits in range(2, 9)})
    with pytest.raises(SourceError, match=r"no safetensors file.*hf://o/quants/model\.gguf"):
        open_base("o/quants")
    with pytest.raises(SourceError, match=r"has no file that is fetched \(safetensors"):
        read_adapter("o/quants")
    assert not hub.fetched()
    with pytest.raises(InputError):  # fetched, and what it holds is no model
        open_base("hf://o/quants/m-Q4.gguf")
    assert hub.fetched() == {"m-Q4.gguf"}
    assert capsys.readouterr().err == ""


def test_an_adapter_is_not_taken_for_a_base(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit("o/n", stored)
    with pytest.raises(SourceError, match="looks like an adapter's folder") as caught:
        open_base("o/n")
    assert str(tmp_path) not in str(caught.value)


def test_errors_about_values_name_the_address_and_not_the_cache(
    hub: FakeHub, stored: dict[str, bytes], rng: np.random.Generator, tmp_path: Path
) -> None:
    weights, files = sharded(rng)
    hub.commit("org/base", files)
    base = open_base("org/base")
    weight = base.weight(next(iter(weights)).removesuffix(".weight"))
    weight.array()
    for shard in base.snapshot.path.glob("*.safetensors"):  # type: ignore[union-attr]
        shard.resolve().write_bytes(b"cut")
    with pytest.raises(InputError, match=r"hf://org/base@\w+/.*file now has 3") as caught:
        weight.array()
    assert str(tmp_path) not in str(caught.value)


def test_an_initial_adapter_comes_from_a_hub_and_its_errors_say_so(
    hub: FakeHub, stored: dict[str, bytes], tmp_path: Path
) -> None:
    config = json.loads(stored["adapter_config.json"]) | {"init_lora_weights": "pissa"}
    own = tmp_path / "stored"
    (own / "adapter_config.json").write_text(json.dumps(config))
    hub.commit("me/start", stored)
    trained = read_adapter(own, initial="hf://me/start")
    name = next(iter(trained))
    assert np.abs(trained[name].delta_weight()).max() < 1e-6  # nothing was trained
    hub.commit("me/none", {"config.json": b"{}", "other.safetensors": save({})})
    with pytest.raises(InputError, match=r"hf://me/none@\w+: no PEFT adapter") as caught:
        read_adapter(own, initial="me/none")
    assert str(tmp_path / "cache") not in str(caught.value)


# --- the command line -------------------------------------------------------------------------


@pytest.mark.slow
def test_every_verb_takes_names(
    hub: FakeHub,
    stored: dict[str, bytes],
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = {f"{n}.weight": rng.standard_normal((24, 20)) for n in adapter(rng)}
    model = save({k: v.astype(np.float32) for k, v in weights.items()})
    commit = hub.commit("o/lora", stored)
    config = b'{"model_type": "llama"}'
    hub.commit("o/base", {"model.safetensors": model, "config.json": config})
    updates = read_adapter(tmp_path / "stored")
    merged = {
        f"{n}.weight": weights[f"{n}.weight"].astype("f4") + update.delta_weight().astype("f4")
        for n, update in updates.items()
    }
    hub.commit("o/merged", {"model.safetensors": save(merged), "config.json": config})
    code, out, err = call(capsys, "inspect", "o/lora", "--format", "json")
    assert (code, err) == (0, "")
    (found,) = document(out)["adapters"]
    assert (found["path"], found["revision"]) == (f"hf://o/lora@{commit}", commit)
    assert str(tmp_path) not in out
    code, out, err = call(capsys, "inspect", "hf://o/lora")
    assert f"hf://o/lora@{commit}" in out
    assert str(tmp_path) not in out
    for ask in (
        ("compare", "o/lora", f"hf://o/lora@{commit}"),
        ("amplify", "hf://o/lora", "--base", "o/base"),
        ("resize", "o/lora", "--rank", 1, "-o", "small"),
        ("merge-check", "o/lora", "--base", "o/base", "--merged", "hf://o/merged"),
        ("compare", "o/lora", "o/merged", "--base", "o/base"),
        ("report", "o/lora", "--base", "hf://o/base", "--figures", "svg", "-o", "report"),
    ):
        code, out, err = call(capsys, *ask)
        assert code == 0, err
        assert str(tmp_path / "cache") not in out + err
    for file in filter(Path.is_file, Path("report").rglob("*.*")):
        assert str(tmp_path / "cache") not in file.read_text(encoding="utf-8", errors="replace")
    code, _, err = call(capsys, "inspect", "o/none")
    assert code == 3
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_the_environment_names_the_hub_and_the_cache(
    stored: dict[str, bytes], tmp_path: Path
) -> None:
    with serving() as hub:
        commit = hub.commit("o/lora", stored)

        def inspect(**environment: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "lora_analysis", "inspect", "o/lora"],
                env=os.environ
                | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
                | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
                | environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )

        missing = inspect(HF_HUB_OFFLINE="1")
        assert missing.returncode == 3
        assert "HF_HUB_OFFLINE is set" in missing.stderr
        assert not hub.requests
        done = inspect()
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no bars where stderr is no terminal
        assert f"hf://o/lora@{commit}" in done.stdout
        assert (tmp_path / "home").is_dir()
        hub.requests.clear()
        assert inspect(HF_HUB_OFFLINE="1").returncode == 0
        assert not hub.requests


def test_a_request_is_made_again_if_an_abandoned_one_closed_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_client, "_abandoned", [])
    release, calls = threading.Event(), []

    def fails_at_first() -> str:
        calls.append(len(calls))
        if len(calls) == 1:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return "answer"

    with pytest.raises(OSError, match="Bad file descriptor"):
        hub_client.in_time(fails_at_first, 5)
    calls.clear()
    with pytest.raises(TimeoutError):
        hub_client.in_time(release.wait, 0.01)
    try:
        assert hub_client.in_time(fails_at_first, 5) == "answer"
    finally:
        release.set()
    assert calls == [0, 1]
