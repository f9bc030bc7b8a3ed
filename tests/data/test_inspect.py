import subprocess
import sys

import yaml

from data.config import ROOT
from data.prepare import prepare

BPE = {"vocab_size": 300}


def run(*arguments):
    command = [sys.executable, "data/inspect.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_person_sees_documents_borders_and_padding(tmp_path):
    (tmp_path / "books").mkdir()
    for i in range(9):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Book {i} begins.\n" + "It goes on. " * 20)
    config = {"name": "b", "path": str(tmp_path / "books"), "validation": {"fraction": 0.2}}
    folder = prepare(config, BPE, tmp_path / "out")
    done = run(f"path={folder}", "seq_len=300", "samples=9", "characters=20")
    assert done.returncode == 0, done.stderr
    assert "300 tokens" in done.stdout and "a document begins" in done.stdout
    assert "| <|endoftext|>Book " in done.stdout and "characters …]" in done.stdout
    assert "padding" in done.stdout and "is to be followed by '<|endoftext|>'" in done.stdout

    settings = {"data_path": str(folder), "seed": 3, "train": {"seq_len": 50}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    of_run = run(f"path={tmp_path}", "samples=2")
    assert of_run.stdout == run(f"path={folder}", "samples=2", "seq_len=50", "seed=3").stdout
    assert "is a later piece" in of_run.stdout


def test_what_holds_no_data_is_said(tmp_path):
    done = run(f"path={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is neither a run's folder nor one that data/prepare.py made" in done.stderr
