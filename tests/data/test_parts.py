"""Preparation that is killed, at any moment and as often as it takes."""

import os
import random
import signal
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from tqdm import tqdm

import data.parts
from data.config import data_config
from data.corpus import Corpus
from data.duplicates import Seen, bands
from data.parts import make_parts
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import Encoder

CONFIG = {"name": "mine", "validation": {"fraction": 0.2}, "drop_near_duplicates": True}
BPE = {"vocab_size": 300}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Some 90 chunks of text files and rows, with documents of all lengths, some of them twice."""
    monkeypatch.setattr(data.parts, "CHUNK", 2000)
    monkeypatch.setenv("RANK", "1")  # says nothing
    rng = random.Random(0)
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(60):
        name = f"{rng.randrange(50)}"  # some are equal
        words = random.Random(name).choices("the quick brown fox jumps over a dog".split(), k=700)
        (folder / f"{i}.txt").write_text(f"Book {name}. " + " ".join(words[: rng.choice([9, 700])]))
    return {**CONFIG, "path": str(folder)}


def fingerprints(folder):
    return [TokenShards.open(folder / side).fingerprint for side in ("train", "validation")]


def prepare_in_a_child(corpus, root):
    pid = os.fork()
    if pid == 0:
        try:
            # The one it would share with its brothers stays taken when one of them is killed.
            tqdm.set_lock(threading.RLock())
            prepare(corpus, BPE, root)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def ended(pid, seconds):
    """Its exit status if it ends within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def test_killed_at_twenty_random_moments_it_loses_and_repeats_nothing(corpus, tmp_path):
    started = time.monotonic()
    assert ended(prepare_in_a_child(corpus, tmp_path / "whole"), 120) == 0
    duration = time.monotonic() - started
    (whole,) = (tmp_path / "whole").glob("mine-*")
    expected = fingerprints(whole)
    assert TokenShards.open(whole / "train").num_documents < 60  # some were there before

    rng, kills, attempt = random.Random(1), 0, 0
    while kills < 20:
        root, attempt = tmp_path / f"killed{attempt}", attempt + 1
        while True:
            pid = prepare_in_a_child(corpus, root)
            status = ended(pid, rng.uniform(0, duration if kills < 20 else 120))
            if status is not None:
                break
            assert kills < 20  # or it never ends
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            for folder in root.glob("mine-*"):  # half a folder never looks whole
                assert fingerprints(folder) == expected
        assert status == 0
        (folder,) = root.glob("mine-*")
        assert fingerprints(folder) == expected
        assert not list(root.glob(".*.partial"))


def test_what_was_made_is_not_made_again(corpus, tokenizer, tmp_path):
    """Broken off after some parts: those are kept, and reading goes on behind them."""
    source = Corpus(data_config(corpus), "data")
    positions = []

    def read(position):
        positions.append(position)
        return source.documents(position)

    def parts(count=None):
        made = make_parts(read, Encoder(tokenizer), True, tmp_path / "parts")
        with closing(made):
            return [part.hashes.tolist() for part in islice(made, count)]

    first = parts(20)
    files = sorted((tmp_path / "parts").glob("*.npz"))
    files[15].write_bytes(files[15].read_bytes()[:-100])  # a disk may lose what it was to keep
    times = {file: file.stat().st_mtime_ns for file in files}
    whole = parts()
    assert whole[:20] == first and whole == parts()
    assert positions[0] is None and positions[1][0] > 0 and positions[2] == [59, 1]
    changed = [file for file in files if file.stat().st_mtime_ns != times[file]]
    assert changed == [files[15]]


def test_the_bands_tell_near_duplicates(corpus):
    rng = random.Random(0)
    words = [str(rng.randrange(1000)) for _ in range(2000)]
    near = words.copy()
    near[::100] = ["changed"] * 20
    far = words[:600] + [str(rng.randrange(1000)) for _ in range(1400)]
    seen = Seen()
    for hash, text in enumerate(map(" ".join, (words, near, far))):
        repeated = seen.repeats(hash, bands(text))
        assert repeated == (text == " ".join(near))
    assert seen.repeats(2, bands("x")) and (seen.exact, seen.near) == (1, 1)
    assert not Seen().repeats(1, np.zeros(0, np.uint64))
    assert (bands("two words") == bands("Two  words")).all() and len(bands("")) == 14


def test_a_worker_killed_for_memory_is_said(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(data.parts, "bands", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="a worker was killed, .* `taskset"):
        prepare(corpus, BPE, tmp_path / "out")
