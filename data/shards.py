"""Token files: what is written once and then read by number for the rest of a run.

A folder of three files, little-endian:
    tokens.bin     uint16 or uint32 [num_tokens + 1]; a document is end-of-text and its tokens, and
                   one more end-of-text closes the file, so that every token has a successor
    documents.npy  int64 [num_documents + 1, 2]; where each document starts, in tokens and in UTF-8
                   bytes of text, and the ends of the last
    header.json    sizes and SHA-256 of the other two, the tokenizer's fingerprint, and a seal over
                   itself; written last, so a folder without it is unfinished
"""

import hashlib
import io
import json
import os
from array import array
from pathlib import Path

import numpy as np

FORMAT = "nsa-lm token shard 1"
TOKENS, DOCUMENTS, HEADER = "tokens.bin", "documents.npy", "header.json"


class TokenShards:
    """A corpus of tokenised documents, memory-mapped.

    Attributes:
        tokens: uint16 or uint32 [num_tokens + 1].
        offsets: int64 [num_documents + 1], where each document starts in `tokens`.
        tokenizer: fingerprint of the tokenizer that made it (data.tokenizer.fingerprint).
        fingerprint: 16 hex digits over tokens, documents and tokenizer, wherever the folder lies.
    """

    def __init__(self, folder: Path, header: dict, tokens: np.ndarray, documents: np.ndarray):
        self.folder, self._header = folder, header
        self.tokens, self.tokenizer = tokens, header["tokenizer"]
        self.fingerprint = _seal(header)[:16]
        self.offsets, self._byte_offsets = documents[:, 0], documents[:, 1]
        self.num_documents = len(documents) - 1
        self.num_tokens = int(self.offsets[-1])
        self.num_bytes = int(self._byte_offsets[-1])  # UTF-8 bytes of the text

    @classmethod
    def open(cls, folder: str | os.PathLike, tokenizer: str | None = None) -> "TokenShards":
        """Maps the files after checking header and sizes, which is cheap; `verify` reads it all.

        Args:
            tokenizer: fingerprint of the tokenizer that must have made it.

        Raises:
            FileNotFoundError: no such folder, or one of its files is missing.
            ValueError: a file is truncated, damaged, not ours or of another tokenizer; the message
                names it.
        """
        folder = Path(folder)
        header = _read_header(folder / HEADER)
        if tokenizer not in (None, header["tokenizer"]):
            _refuse(folder / HEADER, "is of tokens that another tokenizer made")
        for name, expected in header["files"].items():
            size = _existing(folder / name).stat().st_size
            if size != expected["bytes"]:
                _refuse(folder / name, f"has {size} bytes where {HEADER} says {expected['bytes']}")
        try:
            documents = np.load(folder / DOCUMENTS, mmap_mode="r")
        except Exception:  # its header is Python source, and damaged source fails in any way
            _refuse(folder / DOCUMENTS, "isn't a numpy array")
        dtype = np.dtype(header["dtype"])
        tokens = np.memmap(folder / TOKENS, dtype, mode="r").view(np.ndarray)
        if documents.dtype != np.int64 or documents.ndim != 2 or documents.shape[1] != 2:
            _refuse(folder / DOCUMENTS, "isn't a document index")
        if documents[0].any() or documents[-1, 0] + 1 != len(tokens):
            _refuse(folder / DOCUMENTS, f"doesn't belong to the {TOKENS} beside it")
        return cls(folder, header, tokens, documents.view(np.ndarray))

    def verify(self) -> None:
        """Reads both files in full; raises ValueError naming one that isn't as it was written."""
        for name, expected in self._header["files"].items():
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    _refuse(self.folder / name, "doesn't match its checksum")

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i as stored: end-of-text, then the text (so decode `[1:]`)."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents} in {self.folder}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def document_bytes(self, i: int) -> int:
        """UTF-8 bytes of the text of document i."""
        return int(self._byte_offsets[i + 1] - self._byte_offsets[i])


class ShardWriter:
    """Writes a new folder that TokenShards opens; until `close` returns, it doesn't.

    Args:
        folder: is created.
        vocab_size: one more than the largest token id; up to 65,536 a token takes two bytes.
        tokenizer: its fingerprint.
    """

    def __init__(self, folder: Path, vocab_size: int, eot_id: int, tokenizer: str):
        folder.mkdir(parents=True)
        self._folder, self._eot_id, self._tokenizer = folder, eot_id, tokenizer
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._file, self._sha256 = open(folder / TOKENS, "wb"), hashlib.sha256()
        self._documents = array("q", [0, 0])

    @property
    def num_tokens(self) -> int:
        """So far."""
        return self._documents[-2]

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Appends a document: its tokens, end-of-text first, and the UTF-8 bytes of its text."""
        self._write(tokens)
        start, start_byte = self._documents[-2:]
        self._documents.extend((start + len(tokens), start_byte + num_bytes))

    def close(self) -> TokenShards:
        """Seals the folder, reads it back in full and returns it open."""
        self._write(np.array([self._eot_id]))
        _sync(self._file)
        index = io.BytesIO()
        np.save(index, np.array(self._documents, np.int64).reshape(-1, 2))
        with open(self._folder / DOCUMENTS, "wb") as file:
            file.write(index.getbuffer())
            _sync(file)
        digests = {TOKENS: self._sha256, DOCUMENTS: hashlib.sha256(index.getbuffer())}
        header = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "tokenizer": self._tokenizer,
            "files": {
                name: {"bytes": (self._folder / name).stat().st_size, "sha256": digest.hexdigest()}
                for name, digest in digests.items()
            },
        }
        with open(self._folder / HEADER, "w") as file:
            json.dump(header | {"seal": _seal(header)}, file, indent=1)
            _sync(file)
        shards = TokenShards.open(self._folder)
        shards.verify()
        return shards

    def _write(self, tokens: np.ndarray) -> None:
        data = memoryview(tokens.astype(self._dtype)).cast("B")
        self._sha256.update(data)
        self._file.write(data)


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(_existing(path).read_bytes())
        seal = header.pop("seal")
    except (ValueError, AttributeError, TypeError, KeyError):
        _refuse(path, "isn't the header of a token shard")
    if header.get("format") != FORMAT or seal != _seal(header):
        _refuse(path, f"is damaged, or isn't of format {FORMAT!r}")
    return header


def _seal(header: dict) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, so this folder holds no finished token shard")
    return path


def _refuse(path: Path, what: str):
    raise ValueError(
        f"{path} {what}; delete {path.parent.parent} and prepare the data again"
    ) from None


def _sync(file) -> None:
    """Flushes a file to the disk and closes it: a rename must never overtake what it names."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
