"""Limits on sizes that a file states; a file beyond them is refused before memory is reserved."""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 16 * 2**20
"""JSON header of one safetensors file; enough for 100,000 tensors with long names."""

MAX_TENSORS: Final = 100_000
"""Tensors in one safetensors file."""

MAX_GGUF_STRINGS: Final = 2**21
"""Strings in the arrays of one GGUF header: the tokens and merges of the largest vocabularies."""

MAX_TENSOR_DIMENSIONS: Final = 16
"""Axes of one tensor; the kernels in use have at most five."""

MAX_CONFIG_BYTES: Final = 2**20
"""Configuration file (``adapter_config.json``, ``config.json``, ``manifest.json``)."""

MAX_REFERENCE_BYTES: Final = 16 * 2**20
"""File with levels of unrelated adapters, a few hundred bytes per module type and pair of ranks."""

MAX_INDEX_BYTES: Final = 16 * 2**20
"""Index of a sharded model, which names every tensor once."""

MAX_PICKLE_BYTES: Final = 16 * 2**20
"""Pickle that names the tensors of a torch file; their numbers are outside it."""

MAX_NESTING: Final = 8
"""Dictionaries inside dictionaries in a torch file."""

MAX_DOCUMENT_NESTING: Final = 64
"""Objects, arrays or tables inside each other in JSON and TOML, and names joined by dots."""

MAX_TOML_BYTES: Final = 2**18
"""TOML file. People write them, and reading one takes up to 500 times its size in memory."""

MAX_ADAPTER_BYTES: Final = 8 * 2**30
"""The factors of one adapter, as float32."""

MAX_DATA_ROWS: Final = 10_000_000
"""Rows of one file of training data, including those that cannot be read."""

MAX_DATA_FIELDS: Final = 4096
"""Columns of one row of training data."""

MAX_LINE_CHARACTERS: Final = 2**28
"""Line or field of training data; a longer one is left out."""

MAX_CELL_CHARACTERS: Final = 2**20
"""Characters read from one cell of training data."""

MAX_DATA_CHARACTERS: Final = 2**31
"""Characters read from all cells of one file."""

MAX_HUB_ADAPTER_BYTES: Final = 8 * 2**30
"""Total download for one source of adapters."""

MAX_HUB_MODEL_BYTES: Final = 2 * 2**40
"""Total download for one base model; its shards are downloaded as they are read."""

MAX_HUB_FILES: Final = 10_000
"""Files that are downloaded for one source."""

HUB_TIMEOUT: Final = 10
"""Seconds without any data from a hub until a request fails."""

HUB_ANSWER_SECONDS: Final = 60.0
"""Seconds for the list of files or the start of one, retries included."""

HUB_BYTES_PER_SECOND: Final = 100_000
"""A download slower than this, with `HUB_TIMEOUT` more per file, is stopped."""

MAX_SCALE: Final = 1e6
"""Absolute value of the multiplier of an update."""

MIN_SCALE: Final = 1e-12
"""Smallest absolute value of a multiplier that is not zero."""

MAX_VALUE: Final = 1e15
"""Absolute value of one number in a factor; a larger one means a damaged file or a diverged run."""

MAX_RANK: Final = 4096
"""Rank of one low-rank update."""

MAX_DIMENSION: Final = 2**20
"""Input or output features of one adapted weight."""

MAX_EXPERTS: Final = 4096
"""Experts of one stack, each of which becomes a module."""

BLOCK_ELEMENTS: Final = 2**20
"""Elements of one streamed block. Larger ones touch fresh pages, at more cost than the sums."""
