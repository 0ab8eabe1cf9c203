"""``lora-analysis train``: an adapter of a user's own data, in one command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import device_option, force_option, output_options
from lora_analysis.cli.show import print_facts, print_json

if TYPE_CHECKING:
    from lora_analysis.training import RunEvent

_COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "image")
# Options of the command line that are a field of the configuration each, by its place there.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "base": ("base", "source"),
    "revision": ("base", "revision"),
    "dtype": ("base", "dtype"),
    "quantized": ("base", "quantized"),
    "allow_pickle": ("base", "allow_pickle"),
    "test": ("data", "test"),
    "data_format": ("data", "format"),
    "max_length": ("data", "max_length"),
    "limit": ("data", "limit"),
    **{f"{name}_column": ("data", name) for name in _COLUMNS},
    "objective": ("objective",),
    "name": ("task",),
    "method": ("method",),
    "rank": ("rank",),
    "alpha": ("alpha",),
    "dropout": ("dropout",),
    "seed": ("seed",),
    "steps": ("loop", "steps"),
    "epochs": ("loop", "epochs"),
    "batch_size": ("loop", "batch_size"),
    "lr": ("loop", "lr"),
    "schedule": ("loop", "schedule"),
    "autocast": ("loop", "autocast"),
    "evaluations": ("loop", "evaluations"),
}

Command = Callable[..., Any]


def _column_options(command: Command) -> Command:
    for name in reversed(_COLUMNS):
        option = f"--{name.replace('_', '-')}-column"
        what = "second text of a pair" if name == "text_pair" else name
        command = click.option(option, metavar="NAME", help=f"Column of the {what}.")(command)
    return command


@click.command(name="train")
@click.argument("data", metavar="[DATA]", required=False)
@click.option("--base", metavar="BASE", help="Folder of a transformers model, hub id, or minilm.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the run: adapter, metrics.jsonl, manifest.json.",
)
@click.option("--test", metavar="FILE", help="File to test on; else a tenth is held back.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML with any fields.")
@click.option("--preset", metavar="NAME", help="The LoRA paper's, as gpt2-e2e, roberta-base-sst2.")
@click.option("--objective", metavar="WHAT", help="causal-lm, masked-lm, classification, …")
@click.option("--name", metavar="TASK", help="Name of the task; that of the file by default.")
@click.option("--method", metavar="HOW", help="lora, or full: all weights.")
@click.option("--rank", type=int, help="Columns of B.  [default: 8]")
@click.option("--alpha", type=float, help="Scale times rank.  [default: 8]")
@click.option("--dropout", type=float, help="Of the adapted layers' inputs.")
@click.option(
    "--target", "targets", multiple=True, metavar="MODULE", help="End of names to adapt; repeat."
)
@click.option("--seed", type=int, help="Of initial factors, order of data and dropout.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the data.  [default: 3]")
@click.option("--batch-size", type=int, help="Examples in a backward pass.  [default: 16]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 0.0002]")
@click.option("--schedule", metavar="HOW", help="linear, cosine or constant.")
@click.option("--evaluations", type=int, help="How often the test is looked at.")
@click.option("--dtype", metavar="TYPE", help="Of the frozen weights: float32, bfloat16.")
@click.option("--autocast", metavar="TYPE", help="Of matrix products: bfloat16 or float16.")
@click.option("--quantized", metavar="HOW", help="nf4 or int8: the frozen base, QLoRA's way.")
@click.option("--revision", metavar="REV", help="Of a base on a hub.")
@click.option("--allow-pickle", is_flag=True, default=None, help="Read a base's pytorch_model.bin.")
@click.option(
    "--data-format", metavar="HOW", help="jsonl, csv, tsv, parquet, text, e2e, glue, datasets."
)
@_column_options
@click.option("--max-length", type=int, help="Tokens after which a text is cut.  [default: 128]")
@click.option("--limit", type=int, help="Rows to read at most.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any field; TOML.")
@device_option
@click.option("--threads", type=int, help="CPU threads; torch's own number by default.")
@click.option("--fsdp", is_flag=True, help="With torchrun: spread the frozen weights.")
@click.option("--tracker", "trackers", multiple=True, help="tensorboard, trackio or wandb; repeat.")
@force_option
@output_options
def command(
    data: str | None,
    *,
    output: Path,
    file: Path | None,
    preset: str | None,
    targets: tuple[str, ...],
    settings: tuple[str, ...],
    device: str,
    threads: int | None,
    fsdp: bool,
    trackers: tuple[str, ...],
    force: bool,
    form: str,
    **options: Any,
) -> None:
    """Train an adapter on DATA, a file of your own, or on the base's own bundled data.

    A CSV with a text and a label column and a local model are enough:
    lora-analysis train reviews.csv --base models/bert -o runs/reviews

    Interrupted and run again, it goes on from its last checkpoint. Options lie over --config,
    and that over --preset; --set reaches every field, as in
    --set loop.gradient_accumulation_steps=4. On several GPUs: torchrun --nproc-per-node 4
    -m lora_analysis train …, the same options.
    """
    from lora_analysis.storage.documents import read_toml
    from lora_analysis.training import RunConfig, train_run
    from lora_analysis.training.presets import merged
    from lora_analysis.training.presets import preset as preset_fields
    from lora_analysis.training.trackers import check_trackers

    check_trackers(trackers)
    tables = [preset_fields(preset)] if preset else []
    tables += [read_toml(file)] if file else []
    given = _nested({_FIELDS[key]: v for key, v in options.items() if v is not None})
    if data:
        given = merged(given, {"data": {"source": data}})
    if targets:
        given["targets"] = targets[0] if targets == ("all-linear",) else list(targets)
    config = RunConfig.from_dict(merged(*tables, given, *map(_setting, settings)))
    notes: list[str] = []
    with _watched(form, notes) as progress:
        train_run(
            config,
            output,
            device=device,
            threads=threads,
            trackers=trackers,
            sharded=fsdp,
            progress=progress,
            force=force,
        )
    if os.environ.get("RANK", "0") == "0":
        _report(output, form, notes)


def _nested(fields: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return values by their places, ``("loop", "lr")``, as tables in a table."""
    table: dict[str, Any] = {}
    for (*above, name), value in fields.items():
        place = table
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return table


def _setting(text: str) -> dict[str, Any]:
    """Return one ``key=value`` as a table; a value that is no TOML is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        message = f"--set takes KEY=VALUE, found '{text[:80]}'."
        raise click.UsageError(message)
    if key.count(".") > 8:
        message = f"--set: no option has a name like '{key[:80]}'."
        raise click.UsageError(message)
    from lora_analysis.storage.documents import parse_toml

    try:
        return parse_toml(text)
    except ValueError:
        return _nested({tuple(key.strip().split(".")): value.strip()})


@contextmanager
def _watched(form: str, notes: list[str]) -> Iterator[Callable[[RunEvent], None]]:
    """Show notes as they come, and a bar with loss, rate and time left if stderr is a terminal.

    The notes are added to ``notes``.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    hidden = form == "quiet" or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("training", total=None, figures="")
        shown = {"loss": "", "lr": "", "test": ""}  # the latest of each: no event has them all

        def watch(event: RunEvent) -> None:
            if event.note:
                notes.append(event.note)
            if event.note and form != "quiet":
                bar.console.print(f"Note: {event.note}", markup=False, highlight=False)
            if event.loss is not None:
                shown["loss"] = f"loss {event.loss:.4f} "
            if event.lr is not None:
                shown["lr"] = f"lr {event.lr:.1e} "
            if event.test_loss is not None:
                shown["test"] = f"test {event.test_loss:.4f} "
                if event.test_accuracy is not None:
                    shown["test"] += f"({event.test_accuracy:.3f}) "
            figures = "".join(shown.values()) + _memory()
            bar.update(task, completed=event.step, total=event.total, figures=figures)

        yield watch


def _memory() -> str:
    """Return the memory a training takes, of the GPU where it is on one."""
    from lora_analysis.training.devices import gpu_memory

    if on_gpu := gpu_memory():
        return f"{on_gpu / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # not on every system
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**20:.1f} GiB"


def _report(folder: Path, form: str, notes: Sequence[str]) -> None:
    from lora_analysis.finding import Finding
    from lora_analysis.storage.documents import read_json_object

    manifest = read_json_object(folder / "manifest.json")
    if form == "json":
        fields = [{"run": manifest["name"], "text": note} for note in notes]
        findings = [Finding("run-note", one).to_dict() for one in fields]
        print_json({"run": folder, **manifest, "findings": findings})
        return
    if form == "quiet":
        click.echo(folder)
        return
    metrics = manifest["metrics"]
    facts: list[tuple[str, object]] = [("run", folder), ("steps", manifest["steps"])]
    facts += [
        (name.replace("_", " "), f"{value:.4g}{_from(metrics, name)}")
        for name, value in metrics.items()
        if not name.startswith("base_")
    ]
    print_facts([*facts, ("modules", len(manifest["modules"])), ("seconds", manifest["seconds"])])


def _from(metrics: Mapping[str, float], name: str) -> str:
    before = metrics.get(f"base_{name}")
    return "" if before is None else f" (before training {before:.4g})"
