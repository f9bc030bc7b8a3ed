"""The order-2 model on sources whose entropy is known."""

import json
import shutil

import numpy as np
import pytest

from data.shards import ShardWriter
from data.tokenizer import encode_documents, end_of_text_id, fingerprint, vocab_size
from eval.baseline import bits_per_byte, run_baseline
from tests.eval.conftest import TEXT


def test_without_training_a_byte_takes_eight_bits():
    assert bits_per_byte([], [b"abcd"]) == 8 * 5 / 4  # four bytes and the end


@pytest.mark.parametrize("symbols", [2, 16, 64])
def test_uniform_symbols_take_their_logarithm(symbols):
    rng = np.random.default_rng(0)
    training, validation = (
        rng.integers(symbols, size=n, dtype=np.uint8).tobytes() for n in (2_000_000, 50_000)
    )
    # Never less, and more by little: what is not yet known of the 64^3 probabilities.
    found = bits_per_byte([training], [validation])
    assert np.log2(symbols) - 0.001 < found < np.log2(symbols) + 0.1


def test_a_source_that_two_bytes_determine_takes_none():
    x = [1, 1]
    for _ in range(60_000):
        x.append((x[-1] + 3 * x[-2] + 1) % 251)
    source = bytes(x)
    assert bits_per_byte([source[:50_000]], [source[50_000:]]) < 0.05


def test_a_markov_source_takes_its_entropy():
    # After any byte, one of two successors with probabilities 1/4 and 3/4: H = 0.8113 bits.
    rng = np.random.default_rng(0)
    steps = np.where(rng.random(300_000) < 0.25, 1, 2)
    source = (np.cumsum(steps) % 7).astype(np.uint8).tobytes()
    assert bits_per_byte([source[:250_000]], [source[250_000:]]) == pytest.approx(0.8113, abs=0.01)


def test_escape_probabilities_by_hand():
    # Trained on 100 a, 100 b and an end: three symbols in 201. Neither x, y nor z was seen, so all
    # fall to order 0; x alone meets known contexts (of a document's start), each seen once.
    unseen = 3 / (201 + 3) / 256
    end = (1 + 3 / 256) / (201 + 3)
    p = [unseen / 2 / 2, unseen, unseen, end]
    assert bits_per_byte([b"ab" * 100], [b"xyz"]) == pytest.approx(-np.log2(p).sum() / 3)


def test_documents_are_apart():
    apart, joined = (
        bits_per_byte([b"abcd"] * 50, [b"abcd"]),
        bits_per_byte([b"abcd" * 50], [b"abcd"]),
    )
    assert apart < 0.1 < 1 < joined  # where documents start and end was learnt, or was not


def write_shards(folder, texts, tokenizer):
    name, eot_id = fingerprint(tokenizer), end_of_text_id(tokenizer)
    writer = ShardWriter(folder, vocab_size(tokenizer), eot_id, name)
    for tokens, num_bytes in encode_documents(tokenizer, texts):
        writer.add(tokens, num_bytes)
    writer.close()


def test_on_a_mixture(tmp_path, tokenizer):
    data, run = tmp_path / "mixture", tmp_path / "run"
    for name, text in (("one", TEXT[:9000]), ("two", TEXT[9000:20000])):
        write_shards(tmp_path / name / "train", [text], tokenizer)
    write_shards(data / "validation", [TEXT[20000:]], tokenizer)
    tokenizer.save(str(data / "tokenizer.json"))
    sources = {"a": {"folder": "one"}, "tasks": {"haystack": "a"}, "b": {"folder": "two"}}
    (data / "mixture.json").write_text(json.dumps({"sources": sources}))
    run.mkdir()
    (run / "config.yaml").write_text(f"data_path: {data}\n")
    texts = [text.encode() for text in (TEXT[:9000], TEXT[9000:20000], TEXT[20000:])]
    expected = bits_per_byte(texts[:2], texts[2:])
    assert run_baseline(run)["bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_on_the_data_of_a_run(tmp_path, tokenizer):
    data, run = tmp_path / "data", tmp_path / "run"
    splits = {"train": [TEXT[:9000], TEXT[9000:20000]], "validation": [TEXT[20000:]]}
    for side, texts in splits.items():
        write_shards(data / side, texts, tokenizer)
    tokenizer.save(str(data / "tokenizer.json"))
    run.mkdir()
    (run / "config.yaml").write_text(f"data_path: {data}\n")
    training, validation = ([text.encode() for text in texts] for texts in splits.values())
    expected = bits_per_byte(training, validation)
    assert run_baseline(run)["bits_per_byte"] == pytest.approx(expected, rel=1e-12)
    shutil.rmtree(data)
    assert run_baseline(run)["bits_per_byte"] == pytest.approx(expected, rel=1e-12)  # kept
    (run / "config.yaml").write_text("data_path: elsewhere\n")
    with pytest.raises(FileNotFoundError, match="not at elsewhere any more"):
        run_baseline(run)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        run_baseline(data)
