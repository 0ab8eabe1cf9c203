"""Every example in a docstring states a fact."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    ["adapter", "amplify", "chance", "shared_init", "linalg", "similarity", "spectra"],
)
def test_the_examples_of_a_module_hold(module):
    assert doctest.testmod(import_module(f"lora_analysis.{module}")).failed == 0
