"""The package's shape, proved from its source: who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import adapter

import lora_analysis
from lora_analysis.formats import write_adapter

ROOT = Path(lora_analysis.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# A module imports from lower levels and from its own folder only.
LEVELS = {
    "errors": 0,
    "showing": 0,
    "execution": 1,
    "linalg": 1,
    "names": 1,
