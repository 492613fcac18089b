import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.ids import EpochCounter, epoch_of, generation_of, made_at, make_id, system_ids


def test_an_id_is_a_kind_and_26_digits() -> None:
    assert make_id("req", 0.0, bytes(10)) == "req_" + "0" * 26
    assert make_id("req", (1 << 48) / 1000 - 0.001, b"\xff" * 10) == "req_7" + "z" * 25


@given(st.floats(0, 1e11), st.floats(0, 1e11), st.binary(min_size=10, max_size=10), st.binary(min_size=10, max_size=10))
def test_ids_sort_by_time(first: float, second: float, one: bytes, other: bytes) -> None:
    if int(first * 1000) < int(second * 1000):
        assert make_id("x", first, one) < make_id("x", second, other)


def test_entropy_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="10 bytes"):
        make_id("x", 0.0, b"short")


def test_system_ids_differ() -> None:
    assert len({system_ids("x") for _ in range(1000)}) == 1000


@given(st.tuples(st.integers(0, 1000), st.integers(0, 1 << 39)), st.tuples(st.integers(0, 1000), st.integers(0, 1 << 39)))
def test_epochs_are_ordered_as_their_pairs(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (epoch_of(*one) < epoch_of(*other)) == (one < other)
    assert generation_of(epoch_of(*one)) == one[0]


def test_a_counter_gives_newer_epochs_and_a_newer_generation_beats_them() -> None:
    counter = EpochCounter(3)
    first, second = counter.next(), counter.next()
    assert 0 < first < second < EpochCounter(4).next()


@pytest.mark.parametrize("pair", [(-1, 0), (1 << 23, 0), (0, 1 << 40), (0, -1)])
def test_an_epoch_out_of_range_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(OverflowError):
        epoch_of(*pair)


def test_an_id_tells_when_it_was_made_and_other_names_nothing() -> None:
    for now_s in (0.0, 1795902254.123, ((1 << 48) - 1) / 1000):
        assert made_at(make_id("req", now_s, b"\xff" * 10)) == now_s
    for other in ("", "req_", "req_old", "req_8" + "0" * 25, "req_" + "u" * 26, "\u0661" * 26):
        assert made_at(other) is None
