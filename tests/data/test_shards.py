import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import write_shards

from data.shards import ShardWriter, TokenShards

FILES = ("tokens.bin", "documents.npy", "header.json")


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "train", [3, 1, 200])
    return tmp_path / "train"


def test_reads_back_what_was_written(folder):
    shards = TokenShards.open(folder)
    assert (shards.num_documents, shards.num_tokens, shards.num_bytes) == (3, 204, 612)
    assert shards.document(0).tolist() == [0, 2, 3]
    assert shards.document(1).tolist() == [0]
    assert shards.document(2)[-1] == 204 and shards.document_bytes(2) == 600
    assert shards.tokens[-1] == 0
    with pytest.raises(IndexError, match="document 3 of 3"):
        shards.document(3)


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_takes_two_bytes_where_they_are_enough(tmp_path, vocab_size, dtype):
    writer = ShardWriter(tmp_path / "x", vocab_size, 0, "t")
    writer.add(np.array([0, vocab_size - 1]), 5)
    shards = writer.close()
    assert shards.tokens.dtype == dtype and shards.document(0)[1] == vocab_size - 1


def test_the_fingerprint_is_of_the_content(tmp_path, folder):
    fingerprints = {
        TokenShards.open(folder).fingerprint,
        write_shards(tmp_path / "same", [3, 1, 200]).fingerprint,
    }
    assert len(fingerprints) == 1
    assert write_shards(tmp_path / "other", [3, 2, 199]).fingerprint not in fingerprints


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content)) if keep >= 0 else keep])
    with pytest.raises(ValueError, match=name):
        TokenShards.open(folder)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_a_flipped_bit_is_found_by_name(name, data):
    with TemporaryDirectory() as root:
        folder = write_shards(Path(root) / "train", [3, 1, 200]).folder
        content = bytearray((folder / name).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / name).write_bytes(content)
        try:
            shards = TokenShards.open(folder)
            shards.verify()
        except (ValueError, FileNotFoundError) as error:
            assert name in str(error)
        else:  # white space between the fields of the header carries nothing
            assert name == "header.json" and shards.document(2)[-1] == 204


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_refused_by_name(folder, name):
    (folder / name).write_bytes(b'{"a": "letter"}' * 40)
    with pytest.raises(ValueError, match=name):
        TokenShards.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_shard_is_refused(tmp_path, folder, name):
    """Of the same sizes, so that only content can tell."""
    write_shards(tmp_path / "other", [2, 2, 200])
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(ValueError, match="checksum"):
        TokenShards.open(folder).verify()


def test_an_index_of_other_tokens_is_refused_at_opening(tmp_path, folder):
    write_shards(tmp_path / "other", [3, 1, 100])
    shutil.copy(tmp_path / "other" / "documents.npy", folder)
    with pytest.raises(ValueError, match="documents.npy doesn't belong to the tokens.bin"):
        TokenShards.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TokenShards.open(folder)


def test_an_unfinished_shard_does_not_open(tmp_path):
    writer = ShardWriter(tmp_path / "half", 100, 0, "t")
    writer.add(np.array([0, 1, 2]), 5)
    with pytest.raises(FileNotFoundError, match="no finished token shard"):
        TokenShards.open(tmp_path / "half")


def test_opening_reads_no_tokens_and_verifying_reads_them_all(folder):
    tokens = bytearray((folder / "tokens.bin").read_bytes())
    tokens[-1] ^= 1
    (folder / "tokens.bin").write_bytes(tokens)
    shards = TokenShards.open(folder)
    with pytest.raises(ValueError, match="tokens.bin doesn't match its checksum; delete"):
        shards.verify()
