"""Byte-level BPE: trained on a corpus, or loaded from any byte-level tokenizer.json.

Whatever the text, decoding its tokens gives it back, also when it is encoded in pieces; a tokenizer
that can't promise this is refused. The one special token is <|endoftext|>; where a text spells it
out, it is encoded as ordinary characters and ends nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 16  # characters; a longer text is encoded in pieces, in parallel
BATCH = 1 << 21  # characters handed to the encoder at once: some 100 MB of its working memory


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
    path = path / "tokenizer.json" if path.is_dir() else path
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


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[np.ndarray, int]]:
    """For each text its tokens, uint32 with <|endoftext|> in front, and its UTF-8 bytes.

    Texts stream through: what is held at once is one batch and the tokens of one document.
    """
    end_of_text = np.array([end_of_text_id(tokenizer)], np.uint32)
    tokens, num_bytes = [end_of_text], 0
    for batch in _batches(texts):
        encodings = tokenizer.encode_batch_fast(
            [piece for piece, _ in batch], add_special_tokens=False
        )
        for (piece, is_last), encoding in zip(batch, encodings, strict=True):
            tokens.append(np.array(encoding.ids, np.uint32))
            num_bytes += len(piece.encode())
            if is_last:
                yield np.concatenate(tokens), num_bytes
                tokens, num_bytes = [end_of_text], 0


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of about BATCH characters in all, each with a flag on the last piece of its text."""
    batch, size = [], 0
    for text in texts:
        start = 0
        while start < len(text) or start == 0:
            end = _cut(text, start)
            batch.append((text[start:end], end >= len(text)))
            size, start = size + end - start, max(end, 1)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends.

    Before a lone space between two words, where byte-level pre-tokenizers part the words anyway, so
    the tokens are those of the whole; a text without such a place is cut where it stands.
    """
    if len(text) - start <= 2 * PIECE:
        return len(text)
    space = re.compile(r"(?<=\w) (?=\w)").search(text, start + PIECE, start + 2 * PIECE)
    return space.start() if space else start + 2 * PIECE
