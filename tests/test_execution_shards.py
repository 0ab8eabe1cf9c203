"""Shares of the work for jobs that know nothing of each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.errors import InputError
from lora_analysis.execution.protocol import Shard


@given(st.integers(0, 60), st.integers(1, 9))
def test_every_job_is_in_one_shard_and_shards_are_even(jobs: int, count: int) -> None:
    shares = [Shard(index, count).select(range(jobs)) for index in range(1, count + 1)]
    assert sorted(job for share in shares for job in share) == list(range(jobs))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_is_read_from_what_it_prints() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert str(Shard.parse(" 3 / 8 ")) == "3/8"


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "3", "a/b", "1/2/3", "-1/2", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"shard"):
        Shard.parse(text)
