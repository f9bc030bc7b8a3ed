"""From text to a tokenizer and token shards, once.

    python data/prepare.py data=folder data.path=~/books

It makes outputs/data/<name>-<key>/ with tokenizer.json, train/, validation/ (data.shards) and
summary.json; for a mixture one such folder for each source of text, and one with mixture.json and
the validation of all. The key is drawn from the config, the tokenizer, and the names, sizes and
times of the source files: asked again for the same, it opens what is there; interrupted, it goes on
where it was. Training calls `prepare` itself.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder: `import data` works, and no file here can stand in
    # front of a module of the standard library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict

import hydra
from filelock import FileLock
from omegaconf import DictConfig
from tokenizers import Tokenizer
from tqdm import tqdm

from data.config import (
    MixtureConfig,
    ShardsConfig,
    SyntheticConfig,
    TextConfig,
    TokenizerConfig,
    check_root,
    command_line,
    data_config,
    from_config,
    resolve_path,
)
from data.corpus import Corpus
from data.duplicates import Seen
from data.parts import Part, make_parts, num_workers
from data.shards import ShardWriter, TokenShards
from data.stages import MIXTURE
from data.summary import describe, mixture_table, table
from data.tokenizer import (
    Encoder,
    end_of_text_id,
    fingerprint,
    hub_tokenizer,
    load_tokenizer,
    train_tokenizer,
    vocab_size,
)

VERSION = 4  # raise it when the same input gives other files
TOKENIZER_BYTES = 128 << 20  # of text to train a tokenizer: the order of its words has long settled
SIDES = ("train", "validation")


def prepare(data: Mapping, tokenizer: Mapping, root: str | os.PathLike = "outputs/data") -> Path:
    """Prepares a corpus or a mixture unless it is there, prints its summary, returns its folder.

    Any number of processes may call it at once: one works while the others wait, and a folder
    appears under its name only when it is whole.

    Args:
        data, tokenizer: the config groups of these names (data.config).
        root: where prepared data lives; relative to the repository root.

    Raises:
        ValueError, OSError: one sentence on what is wrong in the config or in which file.
    """
    config = data_config(data)
    tokenizer_config = from_config(TokenizerConfig, tokenizer, "tokenizer")
    root = resolve_path(os.fspath(root))
    root.mkdir(parents=True, exist_ok=True)
    if isinstance(config, SyntheticConfig):
        raise ValueError(
            "data: synthetic tasks need text to hide in; mix them with some, as data=novels_and_tasks "
            "does"
        )
    if isinstance(config, MixtureConfig):
        return _prepare_mixture(config, tokenizer_config, root)
    if isinstance(config, ShardsConfig):
        made_by = _tokenizer(tokenizer_config, {}, root)
        folder = _shards_of(config, fingerprint(made_by), "data")
    else:
        corpus = Corpus(config, "data")
        made_by = _tokenizer(tokenizer_config, {"data": (config, corpus)}, root)
        folder = _prepare_text(config, corpus, made_by, root)
    _say(table, folder)
    return folder


def _prepare_mixture(config: MixtureConfig, tokenizer_config: TokenizerConfig, root: Path) -> Path:
    corpora = {
        name: (source, Corpus(source, f"data.sources.{name}"))
        for name, source in config.sources.items()
        if isinstance(source, TextConfig)
    }
    tokenizer = _tokenizer(tokenizer_config, corpora, root)
    mixture: dict = {"weights": config.weights, "sources": {}}
    for name, source in config.sources.items():
        if isinstance(source, SyntheticConfig):
            mixture["sources"][name] = {"tasks": source.tasks, "haystack": source.haystack}
            continue
        if isinstance(source, TextConfig):
            folder = _prepare_text(source, corpora[name][1], tokenizer, root)
        else:
            folder = _shards_of(source, fingerprint(tokenizer), f"data.sources.{name}")
        # What lies beside it is named without its parents: the whole root may move.
        place = folder.name if folder.parent == root else str(folder)
        mixture["sources"][name] = {"folder": place}

    def build(partial: Path) -> None:
        tokenizer.save(str(partial / "tokenizer.json"))
        writer = _writer(partial / "validation", tokenizer)
        summaries = {}
        for name, source in mixture["sources"].items():
            summaries[name] = source
            if "folder" in source:
                held_out = TokenShards.open(root / source["folder"] / "validation")
                for i in range(held_out.num_documents):
                    writer.add(held_out.document(i), held_out.document_bytes(i))
                summaries[name] = json.loads((root / source["folder"] / "summary.json").read_text())
        summary = {
            "name": config.name,
            "weights": config.weights,
            "validation": describe(writer.close()),
            "sources": summaries,
        }
        _write_json(partial / "summary.json", summary)
        _write_json(partial / MIXTURE, mixture)

    folder = _once(root, config.name, mixture, build)
    _say(mixture_table, folder)
    return folder


def _prepare_text(config: TextConfig, corpus: Corpus, tokenizer: Tokenizer, root: Path) -> Path:
    def build(partial: Path) -> None:
        started, was_interrupted = time.time(), (partial / "parts").exists()
        commit = partial / "commit.json"  # an interrupted preparation goes on with the same
        if commit.exists():
            corpus.commit = json.loads(commit.read_text())
        _write_json(commit, corpus.commit)
        encoder, with_bands = Encoder(tokenizer), config.drop_near_duplicates
        parts = make_parts(corpus.documents, encoder, with_bands, partial / "parts")
        tokenizer.save(str(partial / "tokenizer.json"))
        seen, writers = Seen(), {}
        for side in SIDES:
            shutil.rmtree(partial / side, ignore_errors=True)
            writers[side] = _writer(partial / side, tokenizer)
        total, name = corpus.num_bytes, f"tokenizing {config.name}"
        with closing(parts), _bar(name, total) as bar:
            for part in parts:
                bar.update(int(part.num_bytes.sum()))
                if _add(part, writers, seen, config.max_tokens):
                    break
        sides = {side: writer.close() for side, writer in writers.items()}
        for side, shards in sides.items():
            if not shards.num_documents:
                raise ValueError(_empty(config, side, corpus))
        summary = {
            "name": config.name,
            "path": config.path or config.hub.name,
            "commit": corpus.commit,
            "files": len(corpus.files),
            "ignored_files": corpus.ignored(),
            "split": corpus.split,
            "duplicates": {"equal": seen.exact, "nearly equal": seen.near},
            "tokenizer": {
                "fingerprint": fingerprint(tokenizer),
                "vocab_size": vocab_size(tokenizer),
            },
            "seconds": None if was_interrupted else round(time.time() - started, 1),
            "workers": num_workers(),
            **{side: describe(shards) for side, shards in sides.items()},
        }
        _write_json(partial / "summary.json", summary)
        shutil.rmtree(partial / "parts")
        commit.unlink()

    key = [asdict(config), fingerprint(tokenizer), corpus.stamp]
    folder = _once(root, config.name, key, build)
    _check(folder)
    return folder


def _add(part: Part, writers: dict[str, ShardWriter], seen: Seen, max_tokens: int | None) -> bool:
    """Writes a part's documents, but none twice; True when there are tokens enough."""
    ends = part.lengths.cumsum()
    for i, (end, length) in enumerate(zip(ends, part.lengths, strict=True)):
        if max_tokens is not None and writers["train"].num_tokens >= max_tokens:
            return True
        if not seen.repeats(int(part.hashes[i]), part.bands[i]):
            side = "validation" if part.held_out[i] else "train"
            writers[side].add(part.tokens[end - length : end], int(part.num_bytes[i]))
    return False


def _tokenizer(config: TokenizerConfig, corpora: dict, root: Path) -> Tokenizer:
    """The tokenizer that a config names, or one trained on the sources, as much on each."""
    if config.path is not None:
        return load_tokenizer(resolve_path(config.path))
    if config.hub is not None:
        return hub_tokenizer(config.hub, config.revision)
    if not corpora:
        raise ValueError(
            "tokenizer.vocab_size: the data is tokens already, so there is no text to train on; "
            "set tokenizer=file tokenizer.path=… to the folder that data.shards names"
        )

    def texts() -> Iterator[str]:
        for _, corpus in corpora.values():
            train = (document.text for document in corpus.documents() if not document.held_out)
            yield from _first_bytes(train, TOKENIZER_BYTES // len(corpora))

    def build(partial: Path) -> None:
        with _bar("training the tokenizer") as bar:
            trained = train_tokenizer(_watched(texts(), bar), config.vocab_size)
        trained.save(str(partial / "tokenizer.json"))
        if (size := vocab_size(trained)) < config.vocab_size:
            note = f"tokenizer: {size:,} tokens, not {config.vocab_size:,}: no more pairs repeat"
            print(note, file=sys.stderr)

    stamps = [[asdict(source), corpus.stamp] for source, corpus in corpora.values()]
    return load_tokenizer(_once(root, "tokenizer", [config.vocab_size, stamps], build))


def _once(root: Path, name: str, key, build: Callable[[Path], None]) -> Path:
    """The folder <name>-<hash of key> under root; `build` fills it, or goes on filling it."""
    digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:12]
    folder, partial = root / f"{name}-{digest}", root / f".{name}-{digest}.partial"
    with FileLock(root / f".{folder.name}.lock"):
        if not folder.exists():
            partial.mkdir(exist_ok=True)
            build(partial)
            partial.rename(folder)
    return folder


def _write_json(path: Path, content) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)


def _writer(folder: Path, tokenizer: Tokenizer) -> ShardWriter:
    name, eot_id = fingerprint(tokenizer), end_of_text_id(tokenizer)
    return ShardWriter(folder, vocab_size(tokenizer), eot_id, name)


def _empty(config: TextConfig, side: str, corpus: Corpus) -> str:
    if not corpus.files:
        return (
            f"{side}: no document of {config.hub.name} is for it; another data.validation.fraction "
            "or more of data.max_tokens would help"
        )
    path = config.path if side == "train" else config.validation.path or config.path
    return f"{side}: {path} holds no text (its files are empty or blank)"


def _shards_of(config: ShardsConfig, tokenizer: str, where: str) -> Path:
    """The folder of a source that is tokens already, if this tokenizer made it."""
    folder = resolve_path(config.shards)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{where}.shards: {folder} isn't a folder that data/prepare.py made (a tokenizer.json, "
            "train/ and validation/)"
        )
    _check(folder)
    if fingerprint(load_tokenizer(folder)) != tokenizer:
        raise ValueError(
            f"{where}.shards: {folder} was made by another tokenizer than this run's; set "
            f"tokenizer=file tokenizer.path={folder}, or prepare its text anew"
        )
    return folder


def _check(folder: Path) -> None:
    """Header and sizes of both sides, and that the tokenizer beside them made them."""
    name = fingerprint(load_tokenizer(folder / "tokenizer.json"))
    for side in SIDES:
        TokenShards.open(folder / side, name)


def _say(show: Callable[[Path, dict], str], folder: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(show(folder, json.loads((folder / "summary.json").read_text())), flush=True)


def _bar(label: str, total: int | None = None) -> tqdm:
    """A bar on a terminal, nothing in a log."""
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None)


def _watched(texts: Iterator[str], bar: tqdm) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(len(text.encode()))


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


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
