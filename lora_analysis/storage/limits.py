"""The largest things a file may ask for; beyond them it is refused before memory is reserved."""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 16 * 2**20
"""JSON header of one safetensors file. 100,000 tensors with long names fit in it."""

MAX_TENSORS: Final = 100_000
"""Tensors in one safetensors file."""

MAX_GGUF_STRINGS: Final = 2**21
"""Strings in the arrays of one GGUF header: the tokens and merges of the largest vocabularies."""

MAX_TENSOR_DIMENSIONS: Final = 16
"""Axes of one tensor; the deepest kernels in use have five."""

MAX_CONFIG_BYTES: Final = 2**20
"""A configuration file (``adapter_config.json``, ``config.json``, ``manifest.json``)."""

MAX_INDEX_BYTES: Final = 16 * 2**20
"""The index of a sharded model, which names every tensor once."""

MAX_PICKLE_BYTES: Final = 16 * 2**20
"""The pickle that names the tensors of a torch file; their numbers lie outside it."""

MAX_NESTING: Final = 8
"""Dictionaries inside dictionaries in a torch file."""

MAX_DOCUMENT_NESTING: Final = 64
"""Objects, arrays or tables inside each other in JSON and TOML, and names joined by dots."""

MAX_TOML_BYTES: Final = 2**18
"""A TOML file. People write them, and reading one takes up to 500 times its size in memory."""

MAX_ADAPTER_BYTES: Final = 8 * 2**30
"""The factors of one adapter, as float32."""

MAX_DATA_ROWS: Final = 10_000_000
"""Rows of one file of training data, those that cannot be read among them."""

MAX_DATA_FIELDS: Final = 4096
"""Columns of one row of it."""

MAX_LINE_CHARACTERS: Final = 2**28
"""One line or field of it; a longer one is left out."""

MAX_CELL_CHARACTERS: Final = 2**20
"""What is kept of one cell."""

MAX_DATA_CHARACTERS: Final = 2**31
"""What is kept of all cells of one file."""

MAX_HUB_ADAPTER_BYTES: Final = 8 * 2**30
"""What is downloaded for one source of adapters, in all."""

MAX_HUB_MODEL_BYTES: Final = 2 * 2**40
"""The same for one base model; its shards are downloaded as they are read."""

MAX_HUB_FILES: Final = 10_000
"""Files that are downloaded for one source."""

HUB_TIMEOUT: Final = 10
"""Seconds for which a hub may send nothing."""

HUB_ANSWER_SECONDS: Final = 60.0
"""Seconds for the list of files or the start of one, retries included."""

HUB_BYTES_PER_SECOND: Final = 100_000
"""A download slower than this, with `HUB_TIMEOUT` more per file, is stopped."""

MAX_SCALE: Final = 1e6
"""Multiplier of an update, by its size."""

MIN_SCALE: Final = 1e-12
"""The same, where it is not zero."""

MAX_VALUE: Final = 1e15
"""Size of one number in a factor; beyond it a file is damaged, not trained."""

MAX_RANK: Final = 4096
"""Rank of one low-rank update."""

MAX_DIMENSION: Final = 2**20
"""Input or output features of one adapted weight."""

BLOCK_ELEMENTS: Final = 2**20
"""Elements of one streamed block. Larger ones touch fresh pages, which costs more than the sums."""
