"""Work in threads: the order, the bound on what is begun, and errors."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from lora_analysis.execution import available_workers, in_threads


@pytest.mark.parametrize("workers", [1, 2, 5, None])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(in_threads(lambda x: x * x, range(50), workers=workers)) == [
        x * x for x in range(50)
    ]


def test_two_workers_run_at_once():
    both = threading.Barrier(2, timeout=10)
    assert len(set(in_threads(lambda _: both.wait(), range(2), workers=2))) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_items_are_taken_than_can_be_held(workers):
    taken = []

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    for done, _ in enumerate(in_threads(lambda x: x, items(), workers=workers), start=1):
        assert len(taken) <= done + 2 * workers


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_ends_the_walk(workers):
    def fail(item):
        if item == 3:
            message = "item 3"
            raise ValueError(message)
        return item

    results = in_threads(fail, range(1000), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        list(results)


@pytest.mark.parametrize("workers", [1, 2])
def test_blas_has_one_thread_meanwhile(workers):
    def blas_threads(_):
        np.ones((2, 2)) @ np.ones((2, 2))
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    assert list(in_threads(blas_threads, range(3), workers=workers)) == [{1}] * 3


def test_there_is_at_least_one_worker():
    assert available_workers() >= 1
