"""Lengths of a condition, single ones and spans, as they are written and read."""

from __future__ import annotations

import pytest

from dreammix_trt.core.lengths import join_lengths, order_length, parse_lengths, span_of, write_lengths


@pytest.mark.parametrize("text", ["77", "77,101", "77,78-125", "154,155-202,333"])
def test_what_is_written_is_read(text: str) -> None:
    assert join_lengths(parse_lengths(text)) == text
    spans = [span_of(each) for each in parse_lengths(text)]
    lengths = {length for low, high in spans for length in range(low, high + 1)}
    assert write_lengths(lengths, ",") == text


@pytest.mark.parametrize("text", ["", "77,", "a", "125-78", "78-78", "78-", "-78", "77,78-125-130"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_lengths(text)


def test_single_lengths_come_first_and_short_runs_are_written_out() -> None:
    assert sorted(parse_lengths("78-125,101,77"), key=order_length) == [77, 101, (78, 125)]
    assert write_lengths([101, 77, 78, 79, 101]) == "77, 78, 79, 101"
    assert write_lengths(range(152, 158)) == "152, 153, 154, 155-157"
