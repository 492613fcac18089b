"""Incremental detokenisation against the library's decoding of everything at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sllmctl.gateway.detokenize import DetokenizerFactory
from tests.sllmctl.gateway.harness import token_id

_CORPUS = ("Tokens carry positions.", "naïve café — žluťoučký kůň", "日本語のテキスト", "a🙂b👩‍👩‍👧c", "  two  spaces ")


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added"), AddedToken("žluť added")])
    return tokenizer


def _byte_fallback(*, strip: bool) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁a", "b", "▁the", "ab▁c", "▁▁", "é", "日", "<0x>", "<0xZZ>", "▁▁▁"]
    scores = [0.0 if at < 3 else -1.0 - at / 1000 for at in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    pieces = ["<unk>", "▁", "▁a", "b", "▁the", "a▁", "▁▁b", "é", "<s>"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def _word_piece() -> Tokenizer:
    pieces = ["[UNK]", "[CLS]", "one", "##s", "two", "##é", "three"]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[CLS]"])
    return tokenizer


_TOKENIZERS = {
    "byte level": _byte_level(),
    "byte fallback": _byte_fallback(strip=False),
    "byte fallback, stripped": _byte_fallback(strip=True),
    "metaspace": _metaspace("always"),
    "metaspace, never prepended": _metaspace("never"),
    "word piece, over a window": _word_piece(),
}


def _factory(tokenizer: Tokenizer) -> DetokenizerFactory:
    special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
    return DetokenizerFactory(tokenizer, json.loads(tokenizer.to_str())["decoder"], special)


@pytest.mark.parametrize("name", _TOKENIZERS)
@given(data=st.data())
def test_pieces_make_what_decoding_at_once_makes(name: str, data: st.DataObject) -> None:
    tokenizer = _TOKENIZERS[name]
    # Runs of up to 40 byte tokens stay below the limit from which a run is no longer awaited.
    batches = data.draw(st.lists(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=4), max_size=10))
    detokenizer = _factory(tokenizer)()
    pieces = [detokenizer.push(batch) for batch in batches]
    pieces.append(detokenizer.flush())
    ids = [token for batch in batches for token in batch]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(text=st.text("aé日🙂 b\u0301", max_size=20))
def test_no_character_is_split(name: str, text: str) -> None:
    tokenizer = _TOKENIZERS[name]
    factory = _factory(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = factory()
    pieces = [detokenizer.push((token,)) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_an_incomplete_character_at_the_end_is_replaced_once() -> None:
    tokenizer = _TOKENIZERS["byte level"]
    detokenizer = _factory(tokenizer)()
    first, second = (token_id(name, tokenizer) for name in ("ð", "Ł"))  # f0 9f, half of an emoji
    assert detokenizer.push((first, second)) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}" == tokenizer.decode([first, second])


def test_a_long_run_of_byte_tokens_does_not_wait_for_its_end() -> None:
    tokenizer = _TOKENIZERS["byte fallback"]
    detokenizer = _factory(tokenizer)()
    text = "ก" * 100
    sent = ""
    lag = 0
    for byte in text.encode():
        sent += detokenizer.push((token_id(f"<0x{byte:02X}>", tokenizer),))
        lag = max(lag, len(text.encode()) if not sent else 0)
    assert len(sent) == 100, "all of it is out although the run has not ended"
    assert sent + detokenizer.push((token_id("b", tokenizer),)) + detokenizer.flush() == text + "b"


def test_tokens_that_end_in_no_whole_character_make_no_window_grow_for_ever() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "\N{REPLACEMENT CHARACTER}": 1}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    longest, decode = 0, DetokenizerFactory._decode

    class Factory(DetokenizerFactory):
        def _decode(self, ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(self, ids)

    detokenizer = Factory(tokenizer, json.loads(tokenizer.to_str())["decoder"], frozenset())()
    ids = [1] * 1000 + [0]
    assert "".join([detokenizer.push((token,)) for token in ids]) + detokenizer.flush() == tokenizer.decode(ids)
    assert longest < 200

    tokenizer.decoder = decoders.Sequence([decoders.Replace("\N{REPLACEMENT CHARACTER}", ""), decoders.Fuse()])
    detokenizer, longest = Factory(tokenizer, json.loads(tokenizer.to_str())["decoder"], frozenset())(), 0
    assert "".join([detokenizer.push((token,)) for token in ids]) + detokenizer.flush() == "a"
    assert longest < 200, "tokens that have no text hold nothing"


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "metaspace, never prepended"])
@given(data=st.data())
def test_what_tokens_stand_for_makes_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = _TOKENIZERS[name]
    factory = _factory(tokenizer)
    ids = tokenizer.encode(data.draw(st.text("ab é日🙂", max_size=12)), add_special_tokens=False).ids
    assert b"".join(factory.spell(token) for token in ids).decode() == tokenizer.decode(ids)


def test_a_token_without_text_is_spelt_by_its_name() -> None:
    assert _factory(_TOKENIZERS["byte level"]).spell(token_id("</s>", _TOKENIZERS["byte level"])) == b"</s>"
    assert _factory(_TOKENIZERS["word piece, over a window"]).spell(2) == b"one"
    assert _factory(_TOKENIZERS["byte level"]).spell(10**9) == b""


def test_skipped_ids_have_no_text() -> None:
    tokenizer = _TOKENIZERS["byte level"]
    factory = DetokenizerFactory(tokenizer, json.loads(tokenizer.to_str())["decoder"], frozenset({token_id("a", tokenizer)}))
    detokenizer = factory()
    assert detokenizer.push([token_id(name, tokenizer) for name in "bab"]) == "bb"
    assert detokenizer.push([10**9]) == "", "an id beyond the vocabulary has none either"
