"""Damaged and planted files, by the targets of tests/faults: each works, or is refused with a message."""

import random

import pytest
from faults import targets
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

few = hypothesis_settings(derandomize=True, deadline=None, max_examples=20, database=None)
names = pytest.mark.parametrize("name", targets.TARGETS)


@names
def test_valid_input_passes(name):
    for data in targets.TARGETS[name].seeds():
        targets.TARGETS[name].run(data)


@names
@few
@given(seed=st.integers(0, 2**32))
def test_input_that_is_damaged_by_its_structure_works_or_is_refused(name, seed):
    target, rng = targets.TARGETS[name], random.Random(seed)
    data = rng.choice(target.seeds())
    for _ in range(rng.randint(1, 3)):
        data = target.damage(data, rng)
    target.run(data)


@names
@few
@given(data=st.binary(max_size=200))
def test_random_bytes_work_or_are_refused(name, data):
    targets.TARGETS[name].run(data)


def test_a_way_out_that_is_no_message_is_a_finding():
    for error in (
        TypeError("x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
        ValueError(),
        ValueError("x" * 30000),
    ):
        with pytest.raises(targets.Finding if isinstance(error, ValueError) else TypeError), targets.told():
            raise error
