"""Byte-level BPE: trained on a corpus, or loaded from any byte-level tokenizer.json.

Whatever the text, decoding its tokens gives it back, also when it is encoded in pieces; a tokenizer
that can't promise this is refused. The one special token is <|endoftext|>; where a text spells it
out, it is encoded as ordinary characters and ends nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
BLOCK = 1 << 17  # characters encoded at once
KNOWN = 1 << 23  # characters of the words whose tokens an encoder remembers, in some 200 MB
# Where Encoder may part a text: between ASCII characters alone, and the apostrophe is not one of them
# (that of "don't"). W is white space, A letters and digits, P punctuation, O all the rest.
W, A, P, O = (
    r"\t\n\x0b\x0c\r ",
    "0-9A-Za-z",
    r"!-&(-/:-@\[-`{-~",
    r"\x00-\x08\x0e-\x1f'\x7f-\U0010ffff",
)
WORDS = (
    # In "fox.jumps (over": fox . jumps " (" over, if no token joins punctuation and what follows it,
    re.compile(rf"(?!\Z)(?:[{W}{O}]++|(?:[{P}]++|[{A}]++)(?=[{O}]))*+(?:[{P}]++|[{A}]++)?+"),
    # else fox .jumps " (over".
    re.compile(rf"(?!\Z)(?:[{W}{P}{O}]++|[{A}]++(?=[{O}]))*+[{A}]*+"),
)
JOINABLE = re.compile(rf"[^{O}].*[^{O}{W}]|[{A}{P}]", re.DOTALL).fullmatch
TRIAL = "".join(f"ab{c}cd{c}{c}Ef {c}12{c}34567{c} it's\n{c}\t\n{c}x" for c in map(chr, range(128)))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE. GPT-2's word pattern, with every digit a token of its own.

    Args:
        vocab_size: <|endoftext|>, the 256 bytes and the merges. A short text may not have that many
            repeated pairs; the vocabulary is then smaller.
    """
    if vocab_size < 257:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size}: needs 257 or more, the bytes and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _ours(tokenizer)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer.json (or the folder that holds one), adding <|endoftext|> if it has none.

    A normalizer that changes the text, such as Qwen's NFC, is taken off, and that is said.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it isn't a tokenizer.json, or text doesn't survive it.
    """
    path = Path(path)
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a tokenizer.json is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: isn't a tokenizer.json ({error})") from None
    ids = _ours(tokenizer).get_vocab().values()
    if len(set(ids)) < len(ids):  # the library gives a new token the count of tokens for its id
        raise ValueError(
            f"{path}: has gaps between its ids, so {END_OF_TEXT} got one that is taken; "
            "write it into the file with an id of its own"
        )
    if _is_lossless(tokenizer):
        return tokenizer
    normalizer, tokenizer.normalizer = tokenizer.normalizer, None
    if normalizer is None or not _is_lossless(tokenizer):
        raise ValueError(
            f"{path}: text doesn't survive this tokenizer unchanged; a byte-level one is needed, "
            "such as GPT-2's, Llama 3's, Qwen's or one trained here"
        )
    print(f"{path}: used without its normalizer {type(normalizer).__name__}, which changes text")
    return tokenizer


def hub_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer.json of a model on the Hugging Face hub, as `load_tokenizer` opens it.

    Raises:
        ConnectionError: it can't be had; the message says how to do without.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            path = hf_hub_download(name, TOKENIZER, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            HfApi().model_info(name, revision=revision, timeout=30)  # says no without retrying
            path = hf_hub_download(name, TOKENIZER, revision=revision)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ConnectionError(
            f"tokenizer.hub: {name} can't be had ({reason}); with its tokenizer.json on this "
            "machine, set tokenizer=file tokenizer.path=/folder/of/it"
        ) from None
    return load_tokenizer(path)


def _ours(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True  # not saved in the file, hence set at every loading
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_lossless(tokenizer: Tokenizer) -> bool:
    """Tries every byte of UTF-8, letters in two spellings, white space at the ends, and cuts."""
    everything = "".join(map(chr, [*range(0x800), *range(0x800, 0x110000, 0xFFF)]))
    everything = everything.encode("utf-8", "ignore").decode()  # without lone surrogates
    pieces = ["Abc e\u0301 \u00e9 \ufb01 \r\n", f"  {END_OF_TEXT} don't \t{everything}", "end  \n"]
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    return tokenizer.decode(ids, skip_special_tokens=False) == "".join(pieces)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    return tokenizer.token_to_id(END_OF_TEXT)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs: one more than the largest id (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits over everything that decides which tokens a text becomes."""
    parts = json.loads(tokenizer.to_str())
    parts = {key: parts[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes each token stands for, int64 [vocab_size]; 0 for <|endoftext|>.

    The sum over the targets that were scored is the denominator of bits per byte.
    """
    sizes = np.zeros(vocab_size(tokenizer), np.int64)
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    for token, i in tokenizer.get_vocab().items():
        # In the vocabulary of a byte-level model each byte is written as one character.
        sizes[i] = len(added[i].encode()) if i in added else len(token)
    sizes[end_of_text_id(tokenizer)] = 0
    return sizes


class Encoder:
    """Texts to tokens, a few times faster than the library alone: each word is encoded once.

    A text is parted where the tokenizer's word pattern parts it in any case (WORDS), so the tokens
    are those of the whole. Where a tokenizer has no such places, and for more than BLOCK characters
    without one, the text is cut where it stands.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._end_of_text = np.uint32(end_of_text_id(tokenizer)).tobytes()
        self._sizes = token_bytes(tokenizer)
        self._known: dict[str, bytes] = {}  # words' tokens, as uint32
        self._known_size = 0
        self._find = _word_pattern(tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        self._indivisible = [token.content for token in added if not token.special]

    def __call__(self, text: str) -> np.ndarray:
        """uint32 [1 + n]: <|endoftext|> and the tokens of the text."""
        by_words = self._find and not any(name in text for name in self._indivisible)
        tokens, start = [self._end_of_text], 0
        while start < len(text):
            words = [text[start : start + BLOCK]]
            if by_words:
                words = self._find(text, start, start + BLOCK)
                if len(words) > 1 and start + BLOCK < len(text):
                    words.pop()  # it may go on
            self._learn(words)
            tokens += map(self._known.__getitem__, words)
            start += sum(map(len, words))
        return np.frombuffer(b"".join(tokens), np.uint32)

    def _learn(self, words: list[str]) -> None:
        if self._known_size > KNOWN:
            self._known, self._known_size = {}, 0
        known = self._known
        new = list(dict.fromkeys([word for word in words if word not in known]))
        known.update(zip(new, self._encode(new), strict=True))
        self._known_size += sum(map(len, new))

    def _encode(self, words: list[str]) -> list[bytes]:
        """Words side by side in one text: a call of the library costs as much as many words."""
        tokens: dict[str, bytes] = {}
        joinable = [word for word in words if JOINABLE(word)]
        for i in range(0, len(joinable), 1024):
            group = joinable[i : i + 1024]
            # What parts a word from the one before it, whatever the pattern.
            before = ["" if w[0].isspace() else " a\n" if w[0].isalnum() else " a" for w in group]
            parts = [part for pair in zip(before, group, strict=True) for part in pair]
            (ids,) = self._ids(["".join(parts)])
            ends = np.concatenate([[0], self._sizes[ids].cumsum()])
            borders = np.cumsum([len(part.encode()) for part in parts])
            cuts = np.searchsorted(ends, borders)
            if np.array_equal(ends[cuts], borders):
                data, cuts = ids.tobytes(), (4 * cuts).tolist()
                parts = zip(group, cuts[::2], cuts[1::2], strict=True)
                tokens |= {word: data[start:end] for word, start, end in parts}
        alone = [word for word in words if word not in tokens]
        tokens |= zip(alone, [ids.tobytes() for ids in self._ids(alone)], strict=True)
        return [tokens[word] for word in words]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _word_pattern(tokenizer: Tokenizer) -> Callable[..., list[str]] | None:
    """What finds the smallest words whose borders are all borders of the tokenizer's own words."""
    if tokenizer.pre_tokenizer is not None:
        borders = {end for _, (_, end) in tokenizer.pre_tokenizer.pre_tokenize_str(TRIAL)}
        for words in WORDS:
            if borders.issuperset(match.end() for match in words.finditer(TRIAL)):
                return words.findall
    return None


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[np.ndarray, int]]:
    """For each text its tokens, uint32 with <|endoftext|> in front, and its UTF-8 bytes."""
    encode = Encoder(tokenizer)
    return ((encode(text), len(text.encode())) for text in texts)
