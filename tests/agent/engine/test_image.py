"""Tensors over an image: whichever way they lie, each is where its bytes are."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.image import equal_steps, image_tensors
from agent.store.index import TensorIndex

# Pieces as layers make them: so many layers of so many equal gaps.
_pieces = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 5), min_size=1, max_size=5)), max_size=5)

_SHAPES: list[tuple[int, ...]] = [(2,), (1, 2), (), (0, 3)]


def _places(pieces: list[tuple[int, list[int]]]) -> list[int]:
    gaps = [gap for layers, layer in pieces for _ in range(layers) for gap in layer]
    return np.cumsum([3, *gaps]).tolist()


@given(_pieces)
def test_runs_of_equal_steps_are_all_places_once(pieces: list[tuple[int, list[int]]]) -> None:
    places = _places(pieces)
    found: dict[int, int] = {}
    for run in equal_steps(np.array(places, np.int64)):
        for number in range(run.count):
            place = run.first + number * run.period
            assert place not in found
            found[place] = places[run.first] + number * run.step
    assert [found[place] for place in range(len(places))] == places
    assert equal_steps(np.zeros(0, np.int64)) == []


def test_layers_that_are_alike_make_few_runs() -> None:
    queries = [100 + layer * 1000 + part * 10 + (part == 3) for layer in range(500) for part in range(4)]
    assert len(equal_steps(np.array([2, *queries, 600_000], np.int64))) <= 12
    experts = [layer * 9000 + expert * 30 + part * 10 for layer in range(40) for expert in range(64) for part in range(2)]
    assert len(equal_steps(np.array(experts, np.int64))) <= 40 * 4


@given(
    _pieces, st.sampled_from(["F32", "BF16", "U8"]), st.sampled_from([(2,), (1, 2), (), (0, 3)]), st.booleans(), st.randoms()
)
def test_every_tensor_is_where_its_bytes_are(
    pieces: list[tuple[int, list[int]]], dtype: str, shape: tuple[int, ...], aligned: bool, random: object
) -> None:
    places = [place * (8 if aligned else 1) for place in _places(pieces)]
    random.shuffle(places)  # type: ignore[attr-defined]
    count, far = len(places), max(places) + 64
    image = torch.arange(far, dtype=torch.uint8).numpy().tobytes()
    names = [f"t{number}" for number in range(count)]
    starts = np.array([*places, 8], np.int64)
    index = TensorIndex([*names, "other"], [(dtype, shape), ("F32", (2,))], np.array([0] * count + [1]), starts, starts)
    tensors = image_tensors(index, image)
    assert list(tensors) == index.names
    for name, place in zip(names, places, strict=True):
        tensor = tensors[name]
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        data = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
        assert bytes(data.tolist()) == image[place : place + tensor.nbytes]
    assert tensors["other"].view(torch.uint8).tolist() == list(image[8:16])
