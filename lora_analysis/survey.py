"""What section 7 of the LoRA paper found on one model, over the adapters of many authors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.errors import InputError, MalformedFileError, SourceError
from lora_analysis.finding import Failure
from lora_analysis.formats import expand_glob, find_sources, load_adapter, unique_labels
from lora_analysis.formats.options import ReadOptions
from lora_analysis.progress import Progress
from lora_analysis.spectra import SIDES
from lora_analysis.storage.documents import read_toml
from lora_analysis.studies import Study, study
from lora_analysis.studies.base_identity import base_key, is_same_key
from lora_analysis.studies.pair_classes import ONE_SAMPLE, Exclusion, PairClass
from lora_analysis.text import html_table, join_names, overlap_number, plural

# Pairs that say nothing about two trainings: they are one, or of bases that cannot be compared.
_NOT_TWO_TRAININGS: Final = ONE_SAMPLE | {
    PairClass.CHECKPOINT, PairClass.DIFFERENT_BASE, PairClass.BASE_NOT_KNOWN
}  # fmt: skip
_ONE_TRAINING: Final = frozenset({Exclusion.EARLIER, Exclusion.ONE_SAMPLE})
_BASE_NOT_STATED: Final = "not stated"
_MANY_AUTHORS: Final = "different authors"
_OVERLAPS: Final = ("phi_1_1", "phi_r_r", "chance_r_r")
_BY_SIDE: Final = tuple(f"{name}_{side}" for name, side in product(_OVERLAPS, SIDES))
_PAIR_COLUMNS: Final = ("author", "base", "a", "b", "pair_class", "shared_init_modules", *_BY_SIDE)
_OPTIONS: Final = {f.name: f.metadata["command_line"] for f in fields(ReadOptions) if f.metadata}


@dataclass(frozen=True, slots=True)
class AuthorSources:
    """The adapters of one author.

    Attributes
    ----------
    author
        Name for the table.
    sources
        Folders, files, patterns or ``hf://owner/name``.
    options
        How to read them, if the files do not say it themselves.
    """

    author: str
    sources: tuple[str, ...]
    options: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Survey:
    """The adapters of many authors, in tables.

    Attributes
    ----------
    authors
        One row per author and base, and one per base for pairs of different authors: numbers of
        adapters, of distinct trainings and of modules; pairs of distinct trainings, how many of
        them share an initialization, and medians over these pairs of φ(1, 1) and φ(r, r) on each
        side, with the expectation for random subspaces (each pair by its median over modules).
    ranks
        One row per author, base and rank of distinct trainings: medians over modules of the stable
        rank and of the number of directions with 90 % of the energy.
    pairs
        One row per pair that was compared: authors, class, shared initialization, φ by side.
    failures
        Sources that could not be read.
    studies
        The study of each base, or of each author if the base is not stated.
    """

    authors: pd.DataFrame
    ranks: pd.DataFrame
    pairs: pd.DataFrame
    failures: tuple[Failure, ...]
    studies: Mapping[str, Study]

    def __repr__(self) -> str:
        total = int(self.authors["adapters"].sum())
        authors = self.ranks["author"].nunique()
        return f"<Survey of {plural(total, 'adapter')} by {plural(authors, 'author')}>"

    def _repr_html_(self) -> str:
        return html_table("Section 7 over authors", self.columns, self.rows(), self.limits())

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        return ("author", "base", "adapters", "r", "stable rank", "90 % energy", "pairs",
                "same A", "φ(1, 1)", "φ(r, r)", "φ(r, r) input", "random")  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table for reading, one row per author and base.

        Adapters are distinct trainings of all files; r, stable rank and 90 % energy have one
        number per rank; φ is the median over pairs on the output side, then on the input side.
        """
        table = []
        for row in self.authors.to_dict("records"):
            mine = self.ranks[
                (self.ranks["author"] == row["author"]) & (self.ranks["base"] == row["base"])
            ]
            adapters = f"{row['trainings']} of {row['adapters']}" if row["adapters"] else ""
            overlaps = [
                overlap_number(row[name]) if row["pairs"] else ""
                for name in (
                    "phi_1_1_output",
                    "phi_r_r_output",
                    "phi_r_r_input",
                    "chance_r_r_output",
                )
            ]
            table.append(
                (
                    row["author"], row["base"], adapters,
                    ", ".join(str(rank) for rank in mine["rank"]),
                    ", ".join(f"{value:.1f}" for value in mine["stable_rank"]),
                    ", ".join(f"{value:g}" for value in mine["energy_rank_90"]),
                    str(row["pairs"]), str(row["shared_init"]) if row["pairs"] else "",
                    *overlaps,
                )
            )  # fmt: skip
        return table

    def limits(self) -> str:
        """Return sentences on the coverage of the table, and on its limits."""
        trainings = int(self.authors["trainings"].sum())
        total = int(self.authors["adapters"].sum())
        pairs = int(self.authors["pairs"].sum())
        parts = [
            f"{plural(trainings, 'distinct training')} in {plural(total, 'adapter')} of "
            f"{plural(self.ranks['author'].nunique(), 'author')}, "
            f"{plural(pairs, 'pair')} of two trainings on one base. Checkpoints of one run and "
            "near-copies count once; untrained adapters do not count."
        ]
        if pairs and (self.pairs["pair_class"] == PairClass.UNKNOWN).any():
            parts.append(
                "Where files state neither task nor seed, a pair may differ in task, data or rank "
                "as well as in its seed: its φ says how alike two trainings of that author are, "
                "not how alike two seeds are."
            )
        unstated = sorted(set(self.authors.loc[self.authors["base"] == _BASE_NOT_STATED, "author"]))
        if unstated:
            parts.append(
                f"{join_names(unstated)}: the base is not stated, so these adapters are "
                "compared with each other only, as if they had one base."
            )
        parts.append(
            "These are the adapters that were listed, not a sample of all; the table describes "
            "them, and no test is made."
        )
        return " ".join(parts)


def read_author_list(path: str | Path) -> list[AuthorSources]:
    """Read a list of authors and their adapters from a TOML file.

    Each table of the file is an author, with ``sources`` and any read option by its name on the
    command line. Paths are relative to the folder of the file::

        [alice]
        sources = ["alice/*", "hf://alice/adapter"]

        ["Bob's lab"]
        sources = ["bob/lora.safetensors"]
        pair = "w_a_{name},w_b_{name}"
        scale = 1

    Raises
    ------
    InputError
        It is not such a file; the message names the author and the key.
    """
    path = Path(path)
    authors = []
    for author, table in read_toml(path).items():
        where = f"{path}: [{author}]"
        sources = table.get("sources") if isinstance(table, dict) else None
        if isinstance(sources, str):
            sources = [sources]
        if not sources or not all(isinstance(source, str) for source in sources):
            message = f"{where} needs sources: a list of folders, files or hf://owner/name."
            raise MalformedFileError(message)
        unknown = sorted(set(table) - {"sources", *_OPTIONS})
        if unknown:
            message = f"{where} has the unknown key {unknown[0]!r}. Known: sources, " + ", ".join(
                sorted(_OPTIONS)
            )
            raise MalformedFileError(message)
        options = {
            name: _parse_option(where, name, table[name]) for name in table if name != "sources"
        }
        read_options = ReadOptions(**options)
        paths = tuple(_relative_to(path.parent, source) for source in sources)
        authors.append(AuthorSources(author, paths, read_options))
    if not authors:
        message = f"{path} lists no author. Write a table for each: [name] and sources = [...]."
        raise MalformedFileError(message)
    return authors


def _parse_option(where: str, name: str, entry: Any) -> Any:
    option = _OPTIONS[name]
    if isinstance(entry, bool) != (option.parse is bool) or isinstance(entry, list | dict):
        message = f"{where}: {name} is {entry!r}; write it as on the command line."
        raise MalformedFileError(message)
    try:
        return option.parse(entry if isinstance(entry, bool) else str(entry))
    except ValueError as error:
        message = f"{where}: {name} is {entry!r}: {error}."
        raise MalformedFileError(message) from error


def _relative_to(folder: Path, source: str) -> str:
    """Return a source relative to a folder; what is not there may be a repository on a hub."""
    if source.startswith("hf://"):
        return source
    path = str(folder / source)
    try:
        return path if any(Path(match).exists() for match in expand_glob(path)) else source
    except SourceError:
        return source


def survey_authors(
    authors: str | Path | Sequence[AuthorSources], *, progress: Progress | None = None
) -> Survey:
    """Compare what the adapters of many authors use of their rank, and how alike they are.

    Stable rank and directions with 90 % of the energy against the rank, subspace similarity of
    distinct trainings, and shared initializations: what section 7 of Hu et al., "LoRA" (arXiv
    2106.09685) measured on GPT-3, for any adapters.

    Parameters
    ----------
    authors
        A TOML file, see `read_author_list`, or its content.
    progress
        Called with ("adapters", done, total).

    Returns
    -------
    Survey
        Adapters are studied per base model, as far as the files state it: pairs across bases are
        not compared, pairs of different authors on one base are.

    Raises
    ------
    InputError
        The list is malformed, or none of its sources can be read.
    """
    entries = read_author_list(authors) if isinstance(authors, str | Path) else list(authors)
    failures: list[Failure] = []
    read = list(_read(entries, failures, progress))
    if not read:
        message = f"None of the adapters can be read. {failures[0]}" if failures else "No adapter."
        raise SourceError(message)
    names = [author for author, _ in read]
    adapters = unique_labels([adapter for _, adapter in read])
    author_of = {adapter.label: name for name, adapter in zip(names, adapters, strict=True)}
    groups: dict[str, list[Adapter]] = {}
    for author, adapter in zip(names, adapters, strict=True):
        key = base_key(adapter.provenance.base_model) or f"{_BASE_NOT_STATED}: {author}"
        key = next((other for other in groups if is_same_key(key, other)), key)
        groups.setdefault(key, []).append(adapter)
    studies = {key: study(group, progress=progress) for key, group in groups.items()}
    failures += [failure for result in studies.values() for failure in result.failures]
    rows = [row for result in studies.values() for row in _pairs(result, author_of)]
    pairs = pd.DataFrame(rows, columns=None if rows else _PAIR_COLUMNS)
    ranks = pd.concat([_ranks(result, author_of) for result in studies.values()], ignore_index=True)
    table = [row for result in studies.values() for row in _author_rows(result, author_of, pairs)]
    return Survey(pd.DataFrame(table), ranks, pairs, tuple(failures), studies)


def _read(
    entries: Iterable[AuthorSources], failures: list[Failure], progress: Progress | None
) -> Iterator[tuple[str, Adapter]]:
    """Yield authors and their adapters, labeled ``author/name``; append what cannot be read."""
    refs = [
        (entry, ref)
        for entry in entries
        for ref in find_sources(
            entry.sources, failures, pair=entry.options.pair,
            allow_pickle=entry.options.allow_pickle,
        )
    ]  # fmt: skip
    for done, (entry, ref) in enumerate(refs, start=1):
        options = replace(entry.options, label=f"{entry.author}/{ref.label}")
        try:
            yield entry.author, load_adapter(ref, options)
        except InputError as error:
            failures.append(Failure(ref.source, str(error), error))
        if progress is not None:
            progress("adapters", done, len(refs))


def _trainings(result: Study) -> pd.DataFrame:
    """Return the rows of trained adapters, one for each training."""
    left_out = result.runs["excluded"].isin([*_ONE_TRAINING, Exclusion.UNTRAINED])
    return result.runs[~left_out & (result.runs["trained_modules"] > 0)]


def _base_of(result: Study) -> str:
    """Return the name of a study's base as most of its adapters state it."""
    names = result.runs["base_model"].dropna()
    return str(names.mode()[0]) if len(names) else _BASE_NOT_STATED


def _ranks(result: Study, author_of: Mapping[str, str]) -> pd.DataFrame:
    spectra = result.spectra[result.spectra["adapter"].isin(_trainings(result)["adapter"])]
    spectra = spectra[spectra["numerical_rank"] > 0]
    spectra = spectra.assign(author=spectra["adapter"].map(author_of), base=_base_of(result))
    by_rank = spectra.groupby(["author", "base", "rank"], as_index=False)
    return by_rank.agg(
        trainings=("adapter", "nunique"),
        modules=("module", "nunique"),
        stable_rank=("stable_rank", "median"),
        stable_rank_lowest=("stable_rank", "min"),
        stable_rank_highest=("stable_rank", "max"),
        energy_rank_90=("energy_rank_90", "median"),
    )


def _pairs(result: Study, author_of: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair of two trainings, with medians over modules.

    Modules that start from one A are left out on the input side, where φ shows the start.
    """
    trained = set(_trainings(result)["adapter"])
    modules = result.similarities
    modules = modules[(modules["side"] == "output") | ~modules["shared_init"].astype(bool)]
    by_side = dict(iter(modules.groupby(["a", "b", "side"])))
    for pair in result.pairs.to_dict("records"):
        a, b = pair["a"], pair["b"]
        tables = {side: by_side.get((a, b, side)) for side in SIDES}
        if (
            pair["pair_class"] in _NOT_TWO_TRAININGS
            or not {a, b} <= trained
            or not any(table is not None for table in tables.values())
        ):
            continue
        authors = {author_of[a], author_of[b]}
        yield {
            "author": authors.pop() if len(authors) == 1 else _MANY_AUTHORS,
            "base": _base_of(result),
            **{name: pair[name] for name in ("a", "b", "pair_class", "shared_init_modules")},
            **{
                f"{name}_{side}": float("nan") if table is None else float(table[name].median())
                for name, (side, table) in product(_OVERLAPS, tables.items())
            },
        }


def _author_rows(
    result: Study, author_of: Mapping[str, str], pairs: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    base, trainings = _base_of(result), _trainings(result)
    owners = result.runs["adapter"].map(author_of)
    pairs = pairs[pairs["a"].isin(result.runs["adapter"])]
    between = [_MANY_AUTHORS] if (pairs["author"] == _MANY_AUTHORS).any() else []
    for author in [*dict.fromkeys(owners), *between]:
        mine = pairs[pairs["author"] == author]
        yield {
            "author": author,
            "base": base,
            "adapters": int((owners == author).sum()),
            "trainings": int((trainings["adapter"].map(author_of) == author).sum()),
            "pairs": len(mine),
            "shared_init": int((mine["shared_init_modules"] > 0).sum()),
            **{name: float(mine[name].astype(float).median()) for name in _BY_SIDE},
        }
