import json
import os
import pty
import subprocess
import sys
import termios
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import data.prepare
from data.config import ROOT
from data.corpus import cutoff
from data.prepare import prepare
from data.shards import TokenShards
from data.stages import Stage, open_stages
from data.tokenizer import load_tokenizer

BPE = {"vocab_size": 300}


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"Book {i}.\n" + f"It is the book of number {i}.\n" * i)
    return folder


def config(source, **validation):
    return {"name": "mine", "path": str(source), "validation": validation or {"fraction": 0.2}}


def texts(folder, side):
    shards = TokenShards.open(folder / side)
    tokenizer = load_tokenizer(folder)
    assert shards.num_bytes == sum(map(shards.document_bytes, range(shards.num_documents)))
    return [tokenizer.decode(shards.document(i)[1:]) for i in range(shards.num_documents)]


def visible(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def test_every_text_is_on_one_side(books, tmp_path, capsys):
    (books / "blank.txt").write_text(" \n")
    (books / "cover.png").write_bytes(b"")
    folder = prepare(config(books), BPE, tmp_path / "out")
    train, validation = texts(folder, "train"), texts(folder, "validation")
    assert train and validation
    written = [file.read_text() for file in books.glob("[0-9]*.txt")]
    assert Counter(train + validation) == Counter(written)
    assert not set(train) & set(validation)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"]["documents"] == len(train)
    assert summary["validation"]["bytes"] == sum(map(len, validation))
    assert "hash" in summary["split"]
    out = capsys.readouterr().out
    assert "bytes per token" in out and summary["split"] in out
    assert "left out, not a kind that is read: 1 .png" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "summary.json", "tokenizer.json", "train", "validation",
    ]  # fmt: skip


def test_preparing_twice_does_nothing(books, tmp_path, monkeypatch, capsys):
    first = prepare(config(books), BPE, tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(data.prepare, "make_parts", None)
    assert prepare(config(books), BPE, tmp_path / "out") == first
    assert "documents" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    prepare(config(books), BPE, tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_what_changes_the_result_changes_the_folder(books, tmp_path):
    def folder(data=None, tokenizer=BPE):
        return prepare(data or config(books), tokenizer, tmp_path / "out")

    folders = {folder(), folder(tokenizer={"vocab_size": 265}), folder(config(books, fraction=0.5))}
    (books / "0.txt").write_text("Another book 0.\n")
    folders.add(folder())
    folders.add(folder(tokenizer={"path": str(folder() / "tokenizer.json")}))
    assert len(folders) == 4  # the last is there already: the same text and the same tokenizer


def test_an_existing_tokenizer_is_used(books, tmp_path):
    first = prepare(config(books), BPE, tmp_path / "out")
    second = prepare(config(books), {"path": str(first)}, tmp_path / "out")
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    assert texts(second, "train") == texts(first, "train")


def test_validation_of_its_own_never_trains(books, tmp_path):
    held_out = config(books, path=str(books / "1?.txt"))
    folder = prepare(held_out, BPE, tmp_path / "out")
    assert len(texts(folder, "train")) == len(texts(folder, "validation")) == 10
    assert set(texts(folder, "validation")) == {p.read_text() for p in books.glob("1?.txt")}
    with pytest.raises(ValueError, match="nothing is left to train on"):
        prepare(config(books / "1.txt", path=str(books)), BPE, tmp_path / "out")


def test_one_document_is_cut_at_a_line(tmp_path):
    lines = [f"Line {i} of the only book there is.\n" for i in range(200)]
    (tmp_path / "book.txt").write_text("".join(lines))
    folder = prepare(config(tmp_path / "book.txt", fraction=0.1), BPE, tmp_path / "out")
    (train,), (validation,) = texts(folder, "train"), texts(folder, "validation")
    assert train + validation == "".join(lines)
    assert train.endswith("\n") and validation.startswith("Line 1")
    assert len(validation) / len(train + validation) == pytest.approx(0.1, abs=0.01)


def test_rows_of_jsonl_are_documents(tmp_path):
    rows = [{"body": f"Row {i} is text.", "id": i} for i in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = config(tmp_path / "rows.jsonl", fraction=0.1) | {"text_field": "body"}
    folder = prepare(raw, BPE, tmp_path / "out")
    train, validation = texts(folder, "train"), texts(folder, "validation")
    assert len(train) + len(validation) == 300 and 10 < len(validation) < 60


def test_the_cutoff_leaves_something_on_both_sides():
    assert cutoff(list([]), 0.5) is None and cutoff(list([7, 7]), 0.5) is None
    assert cutoff(list([2**63, 2**64 - 1]), 0.1) == 2**63 + 1  # none was drawn: the lowest is
    assert cutoff(list([1, 5]), 0.9) == 5  # all were drawn: the highest isn't
    assert cutoff(list([1, 2**64 - 1]), 0.25) == 2**62


def test_the_embedded_novels(tmp_path):
    """The split that the README of data/austen states."""
    novels = {
        "name": "austen",
        "path": "data/austen/*.txt",
        "validation": {"path": "data/austen/northanger_abbey.txt"},
    }
    folder = prepare(novels, {"vocab_size": 1024}, tmp_path)
    assert [text[:19].strip() for text in texts(folder, "train")] == [
        "EMMA\n\nBy Jane Auste", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILI",
    ]  # fmt: skip
    novel = (ROOT / "data/austen/northanger_abbey.txt").read_text()
    assert texts(folder, "validation") == [novel]
    shards = TokenShards.open(folder / "train")
    assert shards.offsets[1:].tolist() == sorted(set(shards.offsets[1:].tolist()))
    assert (shards.offsets[1:] - shards.offsets[:-1] > 64 << 10).all()


@pytest.mark.parametrize("broken", ["train_tokenizer", "make_parts", "ShardWriter", "describe"])
def test_an_error_in_the_middle_leaves_nothing_that_looks_whole(
    books, tmp_path, monkeypatch, broken
):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.prepare, broken, fail)
        prepare(config(books), BPE, tmp_path / "out")
    assert not any(name.startswith("mine") for name in visible(tmp_path / "out"))
    folder = prepare(config(books), BPE, tmp_path / "out")
    assert len(texts(folder, "train") + texts(folder, "validation")) == 20
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_many_may_prepare_at_once(books, tmp_path):
    script = f"import data.prepare as p; p.prepare({config(books)!r}, {BPE!r}, {str(tmp_path / 'out')!r})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert ["data: " in output for output in outputs] == [True, False, False]
    assert [name.split("-")[0] for name in visible(tmp_path / "out")] == ["mine", "tokenizer"]


def test_a_damaged_folder_is_named(books, tmp_path):
    folder = prepare(config(books), BPE, tmp_path / "out")
    tokens = folder / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{tokens} has .* delete {folder} and prepare"):
        prepare(config(books), BPE, tmp_path / "out")


def test_a_changed_tokenizer_is_noticed(books, tmp_path):
    folder = prepare(config(books), BPE, tmp_path / "out")
    other = prepare(config(books), {"vocab_size": 265}, tmp_path / "out")
    (folder / "tokenizer.json").write_text((other / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="header.json is of tokens that another tokenizer made"):
        prepare(config(books), BPE, tmp_path / "out")
    with pytest.raises(ValueError, match="header.json is of tokens that another tokenizer made"):
        open_stages(folder, [Stage(64)], seed=0)


def test_no_text_is_said(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.txt holds no text"):
        prepare(config(tmp_path / "empty.txt"), BPE, tmp_path / "out")


def run_script(*overrides, home):
    return subprocess.run(
        [sys.executable, str(ROOT / "data" / "prepare.py"), *overrides],
        cwd=home,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command(books, tmp_path, monkeypatch):
    """Typed as the README has it, from another folder; it touches nothing outside its root."""
    odd = books.rename(tmp_path / "my books (2), [new]")
    outputs = tmp_path / "outputs with space"
    done = run_script(
        "data=folder", f"data.path=~/{odd.name}", "tokenizer.vocab_size=300",
        f"output_dir={outputs}", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0].removeprefix("data: "))
    assert folder.parent == outputs / "data"
    assert len(texts(folder, "train") + texts(folder, "validation")) == 20
    assert not (tmp_path / ".cache").exists()

    done = run_script("data=folder", "data.path=~/nothing", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: data.path: nothing at {tmp_path}/nothing (a file, folder"
    )
    assert done.stderr.count("\n") == 1


def test_a_terminal_sees_how_far_it_is(books, tmp_path):
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "data/prepare.py", "data=folder", f"data.path={books}"]
    command += ["tokenizer.vocab_size=300", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, timeout=60)
    os.close(terminal)
    shown = ""
    with suppress(OSError), open(screen, "rb", buffering=0) as file:  # that is how a screen ends
        while part := file.read(1 << 16):
            shown += part.decode()
    assert done.returncode == 0, shown
    assert "training the tokenizer: " in shown and "tokenizing folder: 100%" in shown
