"""Fuzzing: the targets of tests/faults accept damaged and random input, or raise a useful error."""

import random

import pytest
from faults import targets
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

few_examples = hypothesis_settings(derandomize=True, deadline=None, max_examples=20, database=None)
every_target = pytest.mark.parametrize("name", targets.TARGETS)


@every_target
def test_valid_input_passes(name):
    for data in targets.TARGETS[name].seeds():
        targets.TARGETS[name].run(data)


@every_target
@few_examples
@given(seed=st.integers(0, 2**32))
def test_structurally_damaged_input_passes_or_is_refused(name, seed):
    target, rng = targets.TARGETS[name], random.Random(seed)
    data = rng.choice(target.seeds())
    for _ in range(rng.randint(1, 3)):
        data = target.damage(data, rng)
    target.run(data)


@every_target
@few_examples
@given(data=st.binary(max_size=200))
def test_random_bytes_pass_or_are_refused(name, data):
    targets.TARGETS[name].run(data)


def test_an_error_without_a_useful_message_is_a_finding():
    for error in (
        TypeError("x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
        ValueError(),
        ValueError("x" * 30000),
    ):
        with (
            pytest.raises(targets.Finding if isinstance(error, ValueError) else TypeError),
            targets.only_useful_errors(),
        ):
            raise error
