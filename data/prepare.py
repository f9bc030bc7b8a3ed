"""From text files to a tokenizer and token shards, once.

    python data/prepare.py data=folder data.path=~/books

It makes outputs/data/<name>-<key>/ with tokenizer.json, train/, validation/ (data.shards) and
summary.json. The key is drawn from the config and from the names, sizes and times of the source
files: asked again for the same, it opens what is there. Training calls `prepare` itself.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder: `import data` works, and no file here can stand in
    # front of a module of the standard library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
import numpy as np
from filelock import FileLock
from omegaconf import DictConfig
from tokenizers import Tokenizer
from tqdm import tqdm

from data.config import (
    DataConfig,
    TokenizerConfig,
    check_root,
    command_line,
    from_config,
    resolve_path,
)
from data.shards import ShardWriter, TokenShards
from data.split import Corpus
from data.tokenizer import (
    encode_documents,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    vocab_size,
)

VERSION = 2  # raise it when the same input gives other files
TOKENIZER_BYTES = 128 << 20  # of text to train a tokenizer: the order of its words has long settled
LONG = (8 << 10, 32 << 10, 64 << 10)


def prepare(data: Mapping, tokenizer: Mapping, root: str | os.PathLike = "outputs/data") -> Path:
    """Prepares a corpus unless it is there already, prints its summary and returns its folder.

    Any number of processes may call it at once: one works while the others wait, and the folder
    appears under its name only when it is whole.

    Args:
        data, tokenizer: the config groups of these names (data.config.DataConfig, TokenizerConfig).
        root: where prepared data lives; relative to the repository root.

    Raises:
        ValueError, FileNotFoundError: one sentence on what is wrong in the config or in which file.
    """
    config = from_config(DataConfig, data, "data")
    tokenizer_config = from_config(TokenizerConfig, tokenizer, "tokenizer")
    corpus = Corpus(config)
    tokenizer_stamp = asdict(tokenizer_config)
    if tokenizer_config.path is not None:
        tokenizer_stamp["path"] = fingerprint(load_tokenizer(resolve_path(tokenizer_config.path)))
    key = json.dumps([VERSION, asdict(config), tokenizer_stamp, corpus.stamp])
    root = resolve_path(os.fspath(root))
    folder = root / f"{config.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if not folder.exists():
            for abandoned in root.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(abandoned)
            partial = Path(tempfile.mkdtemp(".partial", f".{folder.name}.", root))
            try:
                _build(corpus, config, tokenizer_config, partial)
                partial.chmod(0o755)  # mkdtemp keeps others out
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    _check(folder)
    if os.environ.get("RANK", "0") == "0":
        print(_table(folder, json.loads((folder / "summary.json").read_text())), flush=True)
    return folder


def _build(corpus: Corpus, config: DataConfig, tokenizer_config: TokenizerConfig, folder: Path):
    cache = folder / "cache"
    split = corpus.split(cache)
    if tokenizer_config.path is not None:
        tokenizer = load_tokenizer(resolve_path(tokenizer_config.path))
    else:
        texts = _progress(_first_bytes(split.train(), TOKENIZER_BYTES), "training the tokenizer")
        tokenizer = train_tokenizer(texts, tokenizer_config.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    sides = {}
    for side, texts in (("train", split.train()), ("validation", split.validation())):
        texts = _progress(texts, f"tokenizing: {side}")
        sides[side] = _describe(_write(tokenizer, texts, folder / side, config))
    shutil.rmtree(cache)
    summary = {
        "name": config.name,
        "path": config.path,
        "files": len(corpus.files) + len(corpus.validation_files),
        "ignored_files": dict(corpus.ignored.most_common()),
        "split": split.description,
        "tokenizer": {
            "fingerprint": fingerprint(tokenizer),
            "vocab_size": vocab_size(tokenizer),
            "asked_vocab_size": tokenizer_config.vocab_size,
        },
        **sides,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _write(tokenizer: Tokenizer, texts: Iterator[str], folder: Path, config: DataConfig):
    eot_id, name = end_of_text_id(tokenizer), fingerprint(tokenizer)
    writer = ShardWriter(folder, vocab_size(tokenizer), eot_id, name)
    for tokens, num_bytes in encode_documents(tokenizer, texts):
        writer.add(tokens, num_bytes)
    shards = writer.close()
    if not shards.num_documents:
        path = config.path if folder.name == "train" else config.validation.path or config.path
        raise ValueError(f"{folder.name}: {path} holds no text (its files are empty or blank)")
    return shards


def _describe(shards: TokenShards) -> dict:
    lengths = np.diff(shards.offsets)
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "bytes": shards.num_bytes,
        "bytes_per_token": round(shards.num_bytes / shards.num_tokens, 3),
        "longest_document": int(lengths.max()),
        "share_of_tokens_in_documents_over": {
            str(length): round(float(lengths[lengths > length].sum() / shards.num_tokens), 4)
            for length in LONG
        },
    }


def _check(folder: Path) -> None:
    """Header and sizes of both sides, and that the tokenizer beside them made them."""
    name = fingerprint(load_tokenizer(folder / "tokenizer.json"))
    for side in ("train", "validation"):
        if TokenShards.open(folder / side).tokenizer != name:
            raise ValueError(
                f"{folder / side} wasn't made by the tokenizer.json beside it; delete {folder} and "
                "prepare the data again"
            )


def _table(folder: Path, summary: dict) -> str:
    sides = (summary["train"], summary["validation"])
    rows = [("", "train", "validation")]
    rows += [
        (label, *(f"{side[key]:{form}}" for side in sides))
        for label, key, form in (
            ("documents", "documents", ","),
            ("tokens", "tokens", ","),
            ("bytes", "bytes", ","),
            ("bytes per token", "bytes_per_token", ".2f"),
            ("longest document, tokens", "longest_document", ","),
        )
    ]
    rows += [
        (
            f"tokens in documents > {int(length) >> 10}k",
            *(f"{side['share_of_tokens_in_documents_over'][length]:.1%}" for side in sides),
        )
        for length in sides[0]["share_of_tokens_in_documents_over"]
    ]
    lines = [f"data: {folder}", f"  {summary['split']}"]
    if summary["ignored_files"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in summary["ignored_files"].items())
        lines += [f"  left out, not a kind that is read: {kinds}"]
    size, asked = (summary["tokenizer"][key] for key in ("vocab_size", "asked_vocab_size"))
    note = ""
    if asked and size < asked:
        note = f", not {asked:,}: the text repeats no more pairs"
    elif asked and summary["train"]["bytes"] > TOKENIZER_BYTES:
        note = f", trained on the first {TOKENIZER_BYTES >> 20} MiB"
    lines += [f"  vocabulary of {size:,} tokens{note}"]
    lines += [f"  {label:<26}{train:>16}{validation:>16}" for label, train, validation in rows]
    return "\n".join(lines)


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _progress(texts: Iterator[str], label: str) -> Iterator[str]:
    """A bar on a terminal, nothing in a log."""
    with tqdm(desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode()))


@hydra.main(version_base=None, config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        check_root(config)
        prepare(config.data, config.tokenizer, resolve_path(config.output_dir) / "data")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
