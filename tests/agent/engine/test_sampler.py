from __future__ import annotations

import math

import pytest
import torch

from agent.engine.sampler import BROKEN, NOISE_RANGE, gumbel, sample
from tests.agent.engine.rows import Row, row
from tests.examples import sampled


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def draws(logits: torch.Tensor, count: int, **params: object) -> torch.Tensor:
    """Counts of each token over ``count`` positions of one sequence."""
    tokens = sample(logits.expand(count, -1).contiguous(), [row(position, **params) for position in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-4, 5, (50, 71), generator=generator).to(dtype)  # so that many are equal
    logits[0, 3] = -0.0  # is no less than the zeros behind it
    logits[0] = logits[0].clamp(max=0)
    firsts = [each.index(max(each)) for each in logits.tolist()]
    assert sample(logits.clone(), [row(temperature=0.0)] * 50) == firsts


@pytest.mark.parametrize("place", [0, 30, 70])
def test_one_number_that_is_none_breaks_its_row_wherever_it_stands(place: int) -> None:
    logits = torch.randn((3, 71), generator=torch.Generator().manual_seed(4))
    logits[1, place] = math.nan
    tokens = sample(logits, [row(temperature=0.0)] * 3)
    assert [token == BROKEN for token in tokens] == [False, True, False]


@pytest.mark.parametrize("temperature", sampled([0.5, 1.0, 1.7], 0.5))
def test_frequencies_match_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -2.0, 0.3])
    counts = draws(logits, 20_000, temperature=temperature, seed=11)
    expected = torch.softmax(logits.double() / temperature, 0) * 20_000
    assert chi_square(counts, expected) < 29.9  # 7 degrees of freedom: exceeded once in 10,000 seeds


def test_frequencies_match_the_softmax_where_few_tokens_can_win() -> None:
    logits = torch.full((4096,), -60.0)
    logits[[5, 1000, 4095]] = torch.tensor([1.0, 0.0, 0.5])
    counts = draws(logits, 5_000, temperature=1.0, seed=3)
    kept = counts[[5, 1000, 4095]]
    assert int(kept.sum()) == 5_000
    assert chi_square(kept, torch.softmax(logits[[5, 1000, 4095]].double(), 0) * 5_000) < 18.4  # 2 degrees of freedom


def test_noise_only_for_candidates_is_the_dense_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((64, 997), generator=generator) * 12
    rows = [row(index, index % 3, temperature=0.3 + index / 40, seed=index * 7919) for index in range(64)]
    best = [_by_definition(logits[index], rows[index]) for index in range(64)]
    assert sample(logits.clone(), rows) == best
    spread = logits.clone()
    spread[:, 40:] = -1e4  # now few can win, so the sparse way is taken
    assert sample(spread.clone(), rows) == [_by_definition(spread[index], rows[index]) for index in range(64)]


def _by_definition(logits: torch.Tensor, asked: Row) -> int:
    """Gumbel-max over the whole vocabulary with the generator called once per token."""
    from agent.engine.philox import philox4x32

    tokens = torch.arange(logits.shape[0])
    seed = asked.params.seed
    position, choice, zero = (torch.full_like(tokens, value) for value in (asked.position, asked.choice, 0))
    low, high = torch.full_like(tokens, seed & 0xFFFFFFFF), torch.full_like(tokens, seed >> 32)
    words = torch.stack(philox4x32(position, tokens // 4, choice, zero, low, high), 1)
    noise = gumbel(words[tokens, tokens % 4])
    return int((logits.double() / asked.params.temperature + noise).argmax())


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = (torch.randn((40, 333), generator=generator) * 3).bfloat16()  # many equal logits
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.5},
        {"temperature": 1.1, "min_p": 0.05, "logit_bias": ((3, 4.0), (7, -100.0))},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "presence_penalty": 1.5, "frequency_penalty": -0.7, "repetition_penalty": 0.8},
        {"temperature": 0.6, "min_tokens": 50, "stop_token_ids": tuple(range(0, 333, 2))},
    ]
    tokens = torch.randint(0, 333, (40, 60), generator=generator).tolist()
    rows = [row(index, index % 2, tokens[index], seed=index, **kinds[index % 9]) for index in range(40)]
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(40)]
    order = torch.randperm(40, generator=generator).tolist()
    shuffled = sample(logits[order].clone(), [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_seed_choice_and_position_each_change_the_noise() -> None:
    logits = torch.zeros(512)

    def sequence(seed: int, choice: int, start: int) -> list[int]:
        return sample(
            logits.expand(12, -1).contiguous(), [row(start + i, choice, temperature=1.0, seed=seed) for i in range(12)]
        )

    base = sequence(1, 0, 0)
    assert sequence(1, 0, 0) == base
    assert sequence(1 << 40, 0, 0) != base
    assert sequence(1, 1, 0) != base
    assert sequence(1, 0, 5)[:7] == base[5:]


def test_top_k_keeps_the_greatest_and_their_equals() -> None:
    logits = torch.tensor([1.0, 4.0, 3.0, 3.0, 0.0, -1.0])
    counts = draws(logits, 3_000, temperature=2.0, top_k=2, seed=1)
    assert (counts > 0).tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("size", [6, 3000])
def test_top_p_keeps_the_smallest_set_that_reaches_it(size: int) -> None:
    logits = torch.full((size,), -30.0)
    logits[:6] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]).log()
    counts = draws(logits, 4_000, temperature=1.0, top_p=0.8, seed=2)
    assert (counts[:6] > 0).tolist() == [True, True, True, False, False, False]
    expected = torch.tensor([0.4, 0.3, 0.15]).double() / 0.85 * 4_000
    assert chi_square(counts[:3], expected) < 18.4


def test_top_p_over_a_flat_vocabulary_wider_than_the_first_look() -> None:
    logits = torch.zeros(5_000)
    logits[:2_500] = 1.0
    counts = draws(logits, 2_000, temperature=1.0, top_p=0.6, seed=4)
    assert int(counts[:2_500].sum()) == 2_000
    assert int((counts > 0).sum()) > 1_200


def test_top_k_then_top_p_takes_the_share_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    counts = draws(logits, 2_000, temperature=1.0, top_k=2, top_p=0.5, seed=6)  # 0.4 of 0.7 reaches half
    assert counts.tolist() == [2_000, 0, 0, 0]


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    rows = [row(position, temperature=0.0, min_tokens=2, stop_token_ids=(1,)) for position in range(4)]
    assert [sample(logits.clone(), [each])[0] for each in rows] == [2, 2, 1, 1]


def test_min_p_keeps_what_reaches_a_share_of_the_greatest_probability() -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]).log()
    counts = draws(logits, 3_000, temperature=1.0, min_p=0.3, seed=8)
    assert (counts > 0).tolist() == [True, True, True, False, False, False]
    expected = torch.tensor([0.4, 0.3, 0.15]).double() / 0.85 * 3_000
    assert chi_square(counts[:3], expected) < 18.4
    hotter = draws(logits, 3_000, temperature=2.0, min_p=0.3, seed=8)  # of the tempered probabilities
    assert (hotter > 0).tolist() == [True, True, True, True, True, False]
    assert draws(logits, 500, temperature=1.5, min_p=1.0, seed=8).tolist() == [500, 0, 0, 0, 0, 0]


def test_a_broken_row_is_said_and_harms_no_other() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0], [3.0, 1.0]])
    rows = [row(temperature=t, seed=1) for t in (0.0, 1.0, 1.0, 0.0, 0.0)]
    assert sample(logits, rows) == [1, BROKEN, BROKEN, BROKEN, 0]


def test_noise_stays_within_its_range() -> None:
    ends = gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert bool(ends.isfinite().all())
    assert float(ends[1] - ends[0]) == pytest.approx(NOISE_RANGE, rel=1e-9)
