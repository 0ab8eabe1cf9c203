"""``lora-analysis train``: train an adapter on a data file or on bundled data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    GroupedOption,
    OutputPath,
    VerbCommand,
    device_option,
    force_option,
    output_options,
    tracker_option,
)
from lora_analysis.cli.show import print_facts, print_json

if TYPE_CHECKING:
    from lora_analysis.training import RunEvent

_DATA, _LOOP, _WEIGHTS = "Reading DATA", "Training", "Base weights and machine"
_COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "image")
# Fields of the configuration by the names of their options.
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
        role = "second text of a pair" if name == "text_pair" else name
        command = click.option(
            option,
            cls=GroupedOption,
            section=_DATA,
            metavar="NAME",
            help=f"Column with the {role}.",
        )(command)
    return command


@click.command(name="train", cls=VerbCommand)
@click.argument("data", metavar="[DATA]", required=False)
@click.option(
    "--base",
    metavar="BASE",
    help="Base model: a folder saved by transformers, a name on a hub, digits or minilm.  "
    "[default: digits]",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(file_okay=False, path_type=Path),
    required=True,
    help="Output folder: adapter, metrics.jsonl, manifest.json.",
)
@click.option("--test", metavar="FILE", help="Test file. By default a tenth of DATA is held out.")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="TOML file with options of the run."
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Hyperparameters of the LoRA paper, for example gpt2-e2e or roberta-base-sst2.",
)
@click.option(
    "--objective",
    metavar="OBJECTIVE",
    help="Objective: causal-lm, masked-lm, classification, regression or image-classification. "
    "By default chosen by the columns.",
)
@click.option("--name", metavar="TASK", help="Name of the task. By default that of the file.")
@click.option(
    "--method",
    cls=GroupedOption,
    section=_LOOP,
    metavar="METHOD",
    help="Method: lora, or full (train all weights).",
)
@click.option("--rank", type=int, help="Rank of the adapter.  [default: 8]")
@click.option(
    "--alpha", type=float, help="LoRA alpha; the scale of B·A is alpha / rank.  [default: 8]"
)
@click.option(
    "--dropout",
    cls=GroupedOption,
    section=_LOOP,
    type=float,
    help="Dropout of the LoRA layers' inputs.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="MODULE",
    help="Module to adapt, by the end of its name; can be repeated.",
)
@click.option("--seed", type=int, help="Seed of initial factors, data order and dropout.")
@click.option("--steps", type=int, help="Number of optimizer steps.")
@click.option("--epochs", type=float, help="Number of passes over the data.  [default: 3]")
@click.option(
    "--batch-size",
    cls=GroupedOption,
    section=_LOOP,
    type=int,
    help="Number of examples per backward pass.  [default: 16]",
)
@click.option("--lr", type=float, help="Peak learning rate.  [default: 0.0002]")
@click.option(
    "--schedule",
    cls=GroupedOption,
    section=_LOOP,
    metavar="NAME",
    help="Learning rate: linear, cosine or constant.",
)
@click.option(
    "--evaluations",
    cls=GroupedOption,
    section=_LOOP,
    type=int,
    help="Number of evaluations on the test data.",
)
@click.option(
    "--dtype",
    cls=GroupedOption,
    section=_WEIGHTS,
    metavar="TYPE",
    help="Type of the frozen weights: float32, bfloat16.",
)
@click.option(
    "--autocast",
    cls=GroupedOption,
    section=_WEIGHTS,
    metavar="TYPE",
    help="Type of matrix products: bfloat16 or float16.",
)
@click.option(
    "--quantized",
    cls=GroupedOption,
    section=_WEIGHTS,
    metavar="TYPE",
    help="Quantization of the base model (QLoRA): nf4 or int8.",
)
@click.option(
    "--revision",
    cls=GroupedOption,
    section=_WEIGHTS,
    metavar="REV",
    help="Branch, tag or commit of a base on a hub.",
)
@click.option(
    "--allow-pickle",
    cls=GroupedOption,
    section=_WEIGHTS,
    is_flag=True,
    default=None,
    help="Read a base from pytorch_model.bin.",
)
@click.option(
    "--data-format",
    cls=GroupedOption,
    section=_DATA,
    metavar="FORMAT",
    help="Format of DATA: jsonl, csv, tsv, parquet, text, e2e, glue or datasets.",
)
@_column_options
@click.option(
    "--max-length",
    cls=GroupedOption,
    section=_DATA,
    type=int,
    help="Maximum tokens per text.  [default: 128]",
)
@click.option(
    "--limit", cls=GroupedOption, section=_DATA, type=int, help="Maximum number of rows to read."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of the run, in TOML."
)
@device_option
@click.option(
    "--threads",
    cls=GroupedOption,
    section=_WEIGHTS,
    type=int,
    help="Number of CPU threads. By default that of torch.",
)
@click.option(
    "--fsdp",
    cls=GroupedOption,
    section=_WEIGHTS,
    is_flag=True,
    help="Shard the frozen weights over torchrun's processes.",
)
@tracker_option
@force_option
@output_options("the output folder")
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
    """Train an adapter on a data file, or on data that come with the base model.

    For example, on a CSV file with a text and a label column:
    lora-analysis train reviews.csv --base models/bert -o runs/reviews

    If the command is interrupted, run it again to continue from the last checkpoint. Options
    override --config, which overrides --preset; --set can set any option, for example
    --set loop.gradient_accumulation_steps=4. On several GPUs: torchrun --nproc-per-node 4
    -m lora_analysis train … with the same options.
    """
    from lora_analysis.finding import Finding
    from lora_analysis.storage.documents import read_json_object, read_toml
    from lora_analysis.training import RunConfig, train_run
    from lora_analysis.training.config import get_preset, merge_tables
    from lora_analysis.training.events import check_trackers

    check_trackers(trackers)
    tables = [get_preset(preset)] if preset else []
    tables += [read_toml(file)] if file else []
    table = _nest_tables({_FIELDS[key]: v for key, v in options.items() if v is not None})
    if data:
        table = merge_tables(table, {"data": {"source": data}})
    if targets:
        table["targets"] = targets[0] if targets == ("all-linear",) else list(targets)
    config = RunConfig.from_dict(merge_tables(*tables, table, *map(_parse_setting, settings)))
    notes: list[str] = []
    with _progress_bar(form, notes) as on_event:
        train_run(
            config,
            output,
            device=device,
            threads=threads,
            trackers=trackers,
            sharded=fsdp,
            on_event=on_event,
            force=force,
        )
    if os.environ.get("RANK", "0") == "0":
        manifest = read_json_object(output / "manifest.json")
        if form == "json":
            findings = [Finding("run-note", {"run": manifest["name"], "text": n}) for n in notes]
            document = {"run": output, **manifest, "findings": [f.to_dict() for f in findings]}
            print_json(document)
        elif form == "quiet":
            click.echo(output)
        else:
            metrics = manifest["metrics"]
            facts: list[tuple[str, object]] = [("run", output), ("steps", manifest["steps"])]
            for name, value in metrics.items():
                if not name.startswith("base_"):
                    before = metrics.get(f"base_{name}")
                    change = "" if before is None else f" (before training {before:.4g})"
                    facts.append((name.replace("_", " "), f"{value:.4g}{change}"))
            print_facts(
                [
                    *facts,
                    ("modules", len(manifest["modules"])),
                    ("seconds", manifest["seconds"]),
                ]
            )


def _nest_tables(fields: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return values by path, such as ``("loop", "lr")``, as nested tables."""
    table: dict[str, Any] = {}
    for (*parents, name), value in fields.items():
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return table


def _parse_setting(text: str) -> dict[str, Any]:
    """Return one ``key=value`` as a table; a value that is not TOML is a string."""
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
        return _nest_tables({tuple(key.strip().split(".")): value.strip()})


@contextmanager
def _progress_bar(form: str, notes: list[str]) -> Iterator[Callable[[RunEvent], None]]:
    """Print notes, and a bar with loss, learning rate and time left if stderr is a terminal.

    Notes are also appended to ``notes``.
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
        latest = {"loss": "", "lr": "", "test": ""}  # no event has all of them

        def update(event: RunEvent) -> None:
            if event.note:
                notes.append(event.note)
            if event.note and form != "quiet":
                bar.console.print(f"Note: {event.note}", markup=False, highlight=False)
            if event.loss is not None:
                latest["loss"] = f"loss {event.loss:.4f} "
            if event.lr is not None:
                latest["lr"] = f"lr {event.lr:.1e} "
            if event.test_loss is not None:
                latest["test"] = f"test {event.test_loss:.4f} "
                if event.test_accuracy is not None:
                    latest["test"] += f"({event.test_accuracy:.3f}) "
            figures = "".join(latest.values()) + _format_memory()
            bar.update(task, completed=event.step, total=event.total, figures=figures)

        yield update


def _format_memory() -> str:
    """Return the peak memory of the training, on the GPU if it uses one."""
    from lora_analysis.training.devices import gpu_memory

    if on_gpu := gpu_memory():
        return f"{on_gpu / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # not on every system
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**20:.1f} GiB"
