from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polca_lib.tasks import tokenization
from polca_lib.tasks.tokenization import (
    PAD,
    GrowingArray,
    encode,
    encode_many,
    id_type,
    load_tokenizer,
    pack,
    train_tokenizer,
)

TEXTS = ["The theory of the three thieves, in Œuvre.\n\nThen 1984 was there.\nAnd the café 日本 was theirs."] * 20
VOCABULARY = 300
TOKENIZER = train_tokenizer(TEXTS, VOCABULARY)

HARD = [
    "",
    " ",
    "the theory",
    " the  theory \n\n\n of\r\n thieves\t\n",
    "Ångström, naïve café, Dvořák",
    "e\u0301 a\u0308\u0301 n\u0303",  # letters and the accents that combine with them
    "👩‍👩‍👧 🇫🇷 👍🏽 \U0001f9d1",
    "שלום עולם, مرحبا بالعالم",
    "日本語 ไทย 한국어",
    "a \u200b\u00a0\u2028\u0000\ufeff\uffff b",
    "Donaudampfschifffahrtsgesellschaftskapitän Llanfairpwllgwyngyll",
    f"what {PAD} means",
]
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="the é日👩\u0301\u200d \r\nש", max_size=60),
    st.lists(st.sampled_from(HARD), max_size=4).map("".join),
)


def test_the_vocabulary_has_the_size_asked_for_and_pad_is_last():
    assert TOKENIZER.get_vocab_size(with_added_tokens=False) == VOCABULARY
    assert TOKENIZER.token_to_id(PAD) == VOCABULARY
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(VOCABULARY + 1))


def test_tokens_are_learned_from_the_text():
    # Two merges: a with b, and a space with that.
    assert train_tokenizer(["ab ab ab"], 258).encode("ab ab\nab").tokens == ["ab", "Ġab", "Ċ", "ab"]


def test_the_same_texts_give_the_same_tokenizer_in_any_order():
    others = ["one two three", "the the then", "four five the", "twenty-five threes"] * 5
    first = train_tokenizer(others, 280).to_str()
    assert train_tokenizer(iter(others), 280).to_str() == first
    assert train_tokenizer(reversed(others), 280).to_str() == first
    assert train_tokenizer([*others, "ououou"], 280).to_str() != first


def test_a_text_too_small_for_the_vocabulary_is_refused_with_what_it_gives():
    # The bytes, "ab" and " ab".
    with pytest.raises(ValueError, match="vocabulary = 300 is more than the text it is trained on gives: 258 tokens"):
        train_tokenizer(["ab ab"], 300)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary = 255 .*at least 256"):
        train_tokenizer(TEXTS, 255)
    assert len(encode(train_tokenizer(TEXTS, 256), "thé").ids) == 4


def check_spans(text, tokenizer=TOKENIZER):
    ids, starts, ends = encode(tokenizer, text)
    assert len(ids) == len(starts) == len(ends)
    assert (starts < ends).all()
    if not text:
        assert len(ids) == 0
        return
    assert starts[0] == 0
    assert ends[-1] == len(text)
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    for (start, end), (next_start, next_end) in pairwise(spans):
        # The next token goes on where this one stops, or both have a part of the character at the seam.
        assert next_start in (end, end - 1)
        assert start <= next_start
        assert end <= next_end
    for token, (start, end) in zip(ids.tolist(), spans, strict=True):
        piece = tokenizer.decode([token])
        if "\ufffd" not in piece:
            assert text[start:end] == piece
        else:
            assert len(text[start:end].encode()) > len(tokenizer.id_to_token(token)) or "\ufffd" in text[start:end]


@pytest.mark.parametrize("text", HARD)
def test_spans_of_hard_texts(text):
    check_spans(text)


@given(texts)
def test_spans_cover_any_text(text):
    check_spans(text)


@given(texts)
def test_spans_are_those_of_the_tokenizer_itself(text):
    encoded = encode(TOKENIZER, text)
    assert list(zip(encoded.starts, encoded.ends, strict=True)) == TOKENIZER.encode(text).offsets


@given(texts)
def test_any_text_decodes_to_itself(text):
    assert TOKENIZER.decode(encode(TOKENIZER, text).ids) == text


def test_a_character_in_pieces_belongs_whole_to_each_of_them():
    encoded = encode(TOKENIZER, "a👩b")
    assert encoded.starts.tolist() == [0, 1, 1, 1, 1, 2]
    assert encoded.ends.tolist() == [1, 2, 2, 2, 2, 3]


def test_a_leading_space_belongs_to_its_token():
    encoded = encode(TOKENIZER, "in the")
    assert [(s, e) for s, e in zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True)][-1] == (2, 6)


@given(st.lists(texts, max_size=5))
def test_many_texts_are_encoded_as_each_of_them(many):
    assert [ids.tolist() for ids in encode_many(TOKENIZER, many)] == [
        encode(TOKENIZER, text).ids.tolist() for text in many
    ]


def test_text_never_gives_pad_before_and_after_saving(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_str() == TOKENIZER.to_str()
    for tokenizer in (TOKENIZER, loaded):
        for ids in (encode(tokenizer, f"a {PAD} b").ids, encode_many(tokenizer, [f"a {PAD} b"])[0]):
            assert VOCABULARY not in ids
            assert tokenizer.decode(ids) == f"a {PAD} b"


documents = st.lists(st.integers(0, 12).flatmap(lambda n: arrays(np.int64, n, elements=st.integers(0, 99))), max_size=6)


@given(documents, st.integers(1, 5))
def test_packing_is_that_of_a_loop(documents, width):
    expected = [
        (number, offset, [*document[offset : offset + width], *[100] * width][:width])
        for number, document in enumerate(map(np.ndarray.tolist, documents))
        for offset in range(0, len(document), width)
    ]
    packed = pack(documents, width, 100)
    assert packed.windows.shape == (len(expected), width)
    assert list(zip(packed.document, packed.offset, packed.windows.tolist(), strict=True)) == expected


@given(documents, st.integers(1, 5))
def test_packing_loses_and_repeats_no_token(documents, width):
    packed = pack(iter(documents), width, 100)
    for number, document in enumerate(documents):
        windows = packed.windows[packed.document == number]
        assert windows[windows != 100].tolist() == document.tolist()
    assert (packed.windows != 100).sum() == sum(map(len, documents))
    assert (packed.windows != 100).any(axis=1).all()


def test_a_width_under_one_is_refused():
    with pytest.raises(ValueError, match=r"width = 0 .*at least 1"):
        pack([np.arange(3)], 0, 9)


@pytest.mark.parametrize(("vocabulary", "name"), [(300, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_ids_up_to_pad_fit_their_type(vocabulary, name):
    assert id_type(vocabulary).name == name
    assert np.array([vocabulary], id_type(vocabulary)).tolist() == [vocabulary]


@pytest.mark.parametrize("row", [(), (3,)])
def test_a_growing_array_is_what_was_appended(tmp_path, row):
    parts = [np.arange(n * 3).reshape(n, 3)[(..., *[0] * (1 - len(row)))] for n in (2, 0, 100_000, 1)]
    with GrowingArray(tmp_path / "a.npy", "<u4", row) as growing:
        for part in parts:
            growing.append(part)
    found = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert found.dtype == np.uint32
    assert (found == np.concatenate(parts)).all()
    assert found.shape == (100_003, *row)


def test_a_growing_array_refuses_rows_of_another_shape(tmp_path):
    with GrowingArray(tmp_path / "a.npy", "<u4", (3,)) as growing, pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        growing.append(np.zeros((5, 2)))


@pytest.mark.parametrize("word", ["ab" * 5 * 10**5, " " * 10**6, "語" * 10**5], ids=["letters", "spaces", "no spaces"])
def test_a_word_of_a_megabyte_is_trained_on_and_encoded_whole(word):
    # Without cutting it, this takes many minutes.
    text = f"start {word} end"
    tokenizer = train_tokenizer([text, *TEXTS], 300)
    encoded = encode(tokenizer, text)
    assert tokenizer.decode(encoded.ids.tolist()) == text


def test_ordinary_text_is_trained_on_as_it_is():
    text = "word " * 20_000
    assert list(tokenization._without_long_words(text)) == [text]
