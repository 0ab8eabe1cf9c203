"""Adapters damaged at random, through the command line: run by hand, ``make fuzz``.

What it finds becomes a case in ``tests/corpus``.
"""
