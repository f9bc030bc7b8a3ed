import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data.tokenizer
from data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    encode_documents,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
    vocab_size,
)

ANY_TEXT = st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin-1"))


@given(st.lists(ANY_TEXT, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(tokenizer, texts):
    sizes = token_bytes(tokenizer)
    documents = list(encode_documents(tokenizer, texts))
    assert len(documents) == len(texts)
    for text, (tokens, num_bytes) in zip(texts, documents, strict=True):
        assert tokens.dtype == np.uint32 and tokens[0] == end_of_text_id(tokenizer)
        assert tokenizer.decode(tokens[1:]) == text
        assert num_bytes == len(text.encode()) == sizes[tokens].sum()


def test_a_text_that_spells_the_special_token_ends_nothing(tokenizer):
    text = f"before {END_OF_TEXT} after"
    ((tokens, _),) = encode_documents(tokenizer, [text])
    assert (tokens == end_of_text_id(tokenizer)).sum() == 1
    assert tokenizer.decode(tokens[1:]) == text


PUNCTUATION = st.text(alphabet="ab 1_.-(\n\t'’é語<", max_size=400)


@given(st.lists(PUNCTUATION | ANY_TEXT, max_size=4))
@settings(max_examples=200, deadline=None)
def test_words_have_the_tokens_of_the_whole(tokenizer, texts):
    """However long the words it remembers get, and however short the blocks that it works on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.tokenizer, "KNOWN", 50)
        encode = Encoder(tokenizer)
        for text in texts:
            assert encode(text)[1:].tolist() == tokenizer.encode(text).ids
        patch.setattr(data.tokenizer, "BLOCK", 16)
        for text in texts:
            assert tokenizer.decode(encode(text)[1:]) == text


def test_a_long_text_has_the_tokens_of_the_whole(tokenizer):
    text = "".join(f"The {i}. time, don't\tyou   know:\n\n  fox " for i in range(12_000))
    assert len(text) > 3 * data.tokenizer.BLOCK
    ((tokens, _),) = encode_documents(tokenizer, [text])
    assert tokens[1:].tolist() == tokenizer.encode(text).ids


def test_text_without_words_is_cut_where_it_stands(tokenizer):
    text = "語" * 3 * data.tokenizer.BLOCK
    ((tokens, num_bytes),) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(tokens[1:]) == text and num_bytes == 3 * len(text)


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@given(st.lists(PUNCTUATION | ANY_TEXT, max_size=4))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("pattern", [None, CL100K])
def test_foreign_word_patterns_give_their_own_tokens(tokenizer, pattern, texts):
    """GPT-2's, and that of GPT-4 and Llama 3, with a token over two words that one of us added."""
    foreign = Tokenizer.from_str(tokenizer.to_str())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        foreign.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    foreign.add_tokens(["<b a>"])
    foreign.encode_special_tokens = True
    encode = Encoder(foreign)
    for text in [*texts, "a<b a>b"]:
        assert encode(text)[1:].tolist() == foreign.encode(text).ids


def test_a_tokenizer_without_words_gives_its_own_tokens():
    foreign = byte_level()
    alphabet = foreign.get_vocab()
    foreign.model = models.BPE(alphabet | {"dĠ": 256, "dĠt": 257}, [("d", "Ġ"), ("dĠ", "t")])
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    foreign.add_special_tokens([END_OF_TEXT])
    foreign.no_truncation()
    foreign.no_padding()
    tokens = Encoder(foreign)("red tea")
    assert tokens[1:].tolist() == foreign.encode("red tea").ids and 257 in tokens


def test_digits_stand_alone(tokenizer):
    ((tokens, _),) = encode_documents(tokenizer, ["1815 1815 1815"])
    assert all(
        len(token) == 1 or not any(c.isdigit() for c in token)
        for token in map(tokenizer.id_to_token, tokens[1:].tolist())
    )


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert loaded.encode(END_OF_TEXT).ids == tokenizer.encode(END_OF_TEXT).ids


def test_transformers_opens_it(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "The quick  fox, don't\n\t語 1815"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.convert_tokens_to_ids(END_OF_TEXT) == end_of_text_id(tokenizer)


def test_the_fingerprint_tells_tokenizers_apart(tokenizer):
    assert fingerprint(train_tokenizer(["abcabc abd abd"] * 9, 259)) != fingerprint(tokenizer)


def test_training_is_reproducible():
    texts = [f"text number {i} of many, many texts" for i in range(500)]
    assert fingerprint(train_tokenizer(texts, 350)) == fingerprint(
        train_tokenizer(texts[::-1], 350)
    )


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256: needs 257 or more"):
        train_tokenizer(["text"], 256)


def byte_level(gap=0, **changes) -> Tokenizer:
    """A tokenizer as others save it: without our end of text, with padding switched on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i + gap for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_foreign_tokenizer_gets_an_end_of_text(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = "more than eight bytes, é"
    ((tokens, num_bytes),) = encode_documents(loaded, [text])
    assert loaded.decode(tokens[1:]) == text and len(tokens) == 1 + num_bytes
    assert end_of_text_id(loaded) < vocab_size(loaded) and tokens.max() < vocab_size(loaded)


def test_a_normalizer_is_taken_off_and_that_is_said(tmp_path, capsys):
    byte_level(normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert "without its normalizer NFC" in capsys.readouterr().out
    assert loaded.decode(loaded.encode("e\u0301").ids) == "e\u0301"


def test_ids_with_a_gap_leave_no_room_for_end_of_text(tmp_path):
    byte_level(gap=2).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="gaps between its ids"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    spaces = byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    spaces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="doesn't survive"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: isn't a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.json: no such file"):
        load_tokenizer(tmp_path / "nothing.json")
