"""Streamed text equals the batch decode, and what has been shown never changes: every family, any ids, any chunks."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerFile

from lite_llm.text import Detokenizer, Tokenizer
from tests.text import build

SETTINGS = settings(max_examples=200, deadline=None)
families = pytest.mark.parametrize("family", build.FAMILIES)
TEXTS = [
    "Hello 世界! 👩‍👩‍👧 naïve cafe\u0301 안녕하세요 🙂🙃",
    "  two spaces\n\n\ttab  end ",
    "bytes \ufffd kept, नमस्ते العربية",
    "🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿",
]


@functools.cache
def load(family: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(build.write(Path(folder), build.FAMILIES[family]()))


@functools.cache
def odd_ids(family: str) -> list[int]:
    """Special tokens, ids outside the vocabulary, and the bytes of a smiley, of 好 and of nothing."""
    tokenizer, backend = load(family), load(family)._backend
    bytes_ = [backend.token_to_id(f"<0x{byte:02X}>") for byte in b"\xf0\x9f\x99\x82\xe5\xa5\xbd\xff\xc3\x80"]
    if family == "byte_level":
        bytes_ = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    odd = sorted(tokenizer.special_ids) + [tokenizer.vocab_size + 7] + backend.encode(" the  好 🙂").ids
    return odd + [token for token in bytes_ if token is not None] * 2


def ids_of(family: str) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, load(family).vocab_size - 1)
    return st.lists(st.one_of(any_id, st.sampled_from(odd_ids(family))), max_size=60)


def stream(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> str:
    """The whole text, in chunks of `sizes`, shown so far always a prefix of what comes."""
    shown, at = [], 0
    for size in [*sizes, len(ids)]:
        shown.append(detokenizer.add(ids[at : at + size]))
        at += size
    return "".join(shown) + detokenizer.finish()


@families
@SETTINGS
@given(st.data())
def test_random_ids_stream_to_their_batch_decode(family, data):
    tokenizer, ids = load(family), data.draw(ids_of(family))
    want, detokenizer, shown = tokenizer.decode(ids), Detokenizer(tokenizer), ""
    for token in ids:
        shown += detokenizer.add([token])
        assert want.startswith(shown)
    assert shown + detokenizer.finish() == want
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=20))
    assert stream(Detokenizer(tokenizer, prompt_ids=ids), ids, sizes) == want


@families
@SETTINGS
@given(st.data())
def test_a_continuation_is_what_follows_the_prompt(family, data):
    tokenizer = load(family)
    prompt = data.draw(st.sampled_from(["Hello world", "the a", "  ", "a\n", ""]))
    prompt_ids, ids = tokenizer.encode(prompt), data.draw(ids_of(family))
    want = tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
    if tokenizer.decode(prompt_ids + ids).startswith(tokenizer.decode(prompt_ids)):
        assert stream(Detokenizer(tokenizer, prompt_ids, continuation=True), ids, [1] * len(ids)) == want


@families
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_no_broken_character_is_shown(family, text):
    tokenizer = load(family)
    ids = [token for token in tokenizer.encode(text) if token not in tokenizer.special_ids]
    detokenizer = Detokenizer(tokenizer)
    chunks = [detokenizer.add([token]) for token in ids] + [detokenizer.finish()]
    assert "".join(chunks) == tokenizer.decode(ids)
    if family in ("byte_level", "byte_fallback"):  # the others cannot write every text
        assert "".join(chunks) == text
        assert "".join(chunks).count("\ufffd") == text.count("\ufffd")


@families
@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_that_of_transformers(family, text, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(build.write(tmp_path, build.FAMILIES[family]()))
    ours = load(family)
    ids = ours.encode("<s>" + text + "<|eot_id|>")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_an_unfinished_character_waits_and_the_tail_is_not_lost():
    tokenizer = load("byte_level")
    smiley = [tokenizer._backend.token_to_id(char) for char in "ðŁĻĤ"]  # the four bytes as byte-level letters
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add([token]) for token in smiley] == ["", "", "", "🙂"]
    assert [detokenizer.add([token]) for token in smiley[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_a_byte_run_waits_because_one_bad_byte_undoes_it():
    tokenizer = load("byte_fallback")
    of = tokenizer._backend.token_to_id
    run = [of("<0xE5>"), of("<0xA5>"), of("<0xBD>")]
    good, bad = Detokenizer(tokenizer), Detokenizer(tokenizer)
    assert [good.add([token]) for token in [*run, of("▁the")]] == ["", "", "", "好 the"]
    assert [bad.add([token]) for token in [*run, of("<0xFF>"), of("▁the")]] == ["", "", "", "", "\ufffd" * 4 + " the"]


@families
def test_the_window_is_bounded(family):
    tokenizer = load(family)
    detokenizer = Detokenizer(tokenizer)
    broken = tokenizer._backend.token_to_id("ÿ") if family == "byte_level" else None  # byte 0xFF, for ever
    token = broken or tokenizer.encode("the")[-1]
    for _ in range(500):
        detokenizer.add([token])
        assert len(detokenizer._ids) <= 16


@pytest.mark.parametrize("family, token, text", [("byte_level", "Ġthe", " the"), ("byte_fallback", "▁the", " the")])
def test_token_text_keeps_the_space(family, token, text):
    tokenizer = load(family)
    ids = tokenizer.encode("hello the")
    assert tokenizer.token_text(ids[-1]) == text
    assert tokenizer.piece(ids[-1]) == token
    assert tokenizer.token_text(tokenizer.bos_id) == "<s>"
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


def test_a_vocabulary_entry_without_text_does_not_lose_the_first_space():
    spec = json.loads(build.byte_fallback().to_str())
    empty = spec["model"]["vocab"][""] = spec["model"]["vocab"].pop("|")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(build.write(Path(folder), TokenizerFile.from_str(json.dumps(spec))))
    ids = [tokenizer._backend.token_to_id("▁Hello"), *[empty] * 20, tokenizer._backend.token_to_id("▁the")]
    assert stream(Detokenizer(tokenizer), ids, [1] * len(ids)) == tokenizer.decode(ids) == "Hello the"


def test_a_continuation_does_not_reopen_the_byte_run_of_the_prompt():
    tokenizer = load("byte_fallback")
    of = tokenizer._backend.token_to_id
    prompt_ids = tokenizer.encode("the 好")[:-1] + [of("<0xE5>"), of("<0xA5>"), of("<0xBD>")]
    detokenizer = Detokenizer(tokenizer, prompt_ids, continuation=True)
    assert stream(detokenizer, [of("<0xFF>"), of("▁the")], [1, 1]) == "\ufffd the"


@families
def test_whole_characters_are_looked_up_where_decoders_are_known(family, monkeypatch):
    tokenizer = load(family)
    ids = tokenizer.encode("Hello world the fox jumps over the lazy dog")[1:]
    known = family in ("byte_level", "byte_fallback", "metaspace")
    assert any(map(tokenizer.plain_text, ids)) == known
    assert not any(tokenizer.plain_text(token) for token in tokenizer.special_ids)
    want, detokenizer = tokenizer.decode(ids), Detokenizer(tokenizer)
    shown, calls = detokenizer.add(ids[:1]), []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda *args: calls.append(args) or decode(*args))
    for token in ids[1:]:
        shown += detokenizer.add([token])
    plain = [token for token in ids[1:] if tokenizer.plain_text(token)]
    assert len(calls) <= 2 * (len(ids) - 1 - len(plain)) + 1
    assert shown + detokenizer.finish() == want
