from __future__ import annotations

import pytest
import torch

from agent.engine.logprobs import LogprobTable
from agent.engine.sampler import sample
from schema.errors import InvalidInput
from schema.sampling import MAX_LOGPROBS, read_logprobs
from tests.agent.engine.rows import row


def test_records_are_the_models_own_distribution_whatever_was_asked() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((4, 300), generator=generator) * 3
    rows = [
        row(0, logprobs=3, temperature=0.2, seed=1),
        row(1),
        row(2, logprobs=0, logit_bias=((17, 100.0),)),
        row(3, logprobs=MAX_LOGPROBS, temperature=0.0),
    ]
    table = LogprobTable(logits, rows)
    tokens = sample(logits.clone(), rows)
    records = table.records(tokens)
    assert sorted(records) == [0, 2, 3]
    expected = logits.log_softmax(dim=1)
    for at, record in records.items():
        (told,) = read_logprobs(record, 1)
        assert told.token == tokens[at]
        assert told.logprob == pytest.approx(float(expected[at, tokens[at]]), abs=1e-5)
        values, ids = expected[at].topk(rows[at].params.logprobs or 0)
        assert [token for token, _ in told.top] == ids.tolist()
        assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert tokens[2] == 17


def test_a_row_is_told_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn((12, 257), generator=generator) * 2).bfloat16()  # many equal ones
    rows = [row(at, logprobs=at % 5 * 5) for at in range(12)]
    tokens = [at * 11 for at in range(12)]
    together = LogprobTable(logits, rows).records(tokens)
    for at in range(12):
        alone = LogprobTable(logits[at : at + 1], rows[at : at + 1]).records([tokens[at]])
        assert alone[0] == together[at]


def test_tiny_vocabularies_and_impossible_tokens_have_records_too() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    (told,) = read_logprobs(LogprobTable(logits, [row(logprobs=5)]).records([1])[0], 1)
    assert told.logprob == -9999.0
    assert [token for token, _ in told.top] == [2, 0, 1]
    assert LogprobTable(logits, [row()]).records([1]) == {}


def test_bytes_that_are_no_records_are_refused() -> None:
    assert read_logprobs(b"", 0) == []
    for records, tokens in ((b"1234567", 1), (b"12345678" * 3, 2), (b"", 1), (b"12345678", 0)):
        with pytest.raises(InvalidInput, match="no log-probabilities"):
            read_logprobs(records, tokens)
