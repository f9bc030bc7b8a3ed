"""A look inside: some packed samples as the model gets them, decoded, with document borders.

python data/inspect.py path=outputs/quickstart
python data/inspect.py path=outputs/data/folder-0123456789ab seq_len=8192 first=100 samples=1
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Not this folder: this file would stand in front of the standard library's `inspect`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterator
from dataclasses import dataclass

import hydra
import yaml
from omegaconf import DictConfig
from tokenizers import Tokenizer

from data.batch import NOT_SCORED, Batch
from data.config import command_line, from_config, resolve_path
from data.stages import Stage, open_stages
from data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class InspectSettings:
    """conf/inspect.yaml"""

    path: str
    seq_len: int | None
    seed: int | None
    first: int
    samples: int
    characters: int


def show(batch: Batch, tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    """Lines: each document's place, size and first and last characters."""
    ends = batch.cu_seqlens.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        tokens, targets = batch.tokens[start:end], batch.targets[start:end]
        if (targets == NOT_SCORED).all():
            yield f"  --- tokens {start:,} to {end - 1:,}: padding"
            continue
        opens = tokenizer.decode(tokens[:1].tolist(), skip_special_tokens=False)
        kind = "begins" if opens == "<|endoftext|>" else "is a later piece"
        yield f"  --- tokens {start:,} to {end - 1:,}: a document {kind}, {end - start:,} tokens"
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        if len(text) > 2 * characters:
            left_out = len(text) - 2 * characters
            text = f"{text[:characters]} [… {left_out:,} characters …] {text[-characters:]}"
        yield from (f"  | {line}" for line in text.split("\n"))
        last = tokenizer.decode(targets[-1:].tolist(), skip_special_tokens=False)
        yield f"  --> the last token is to be followed by {last!r}"


def inspect(settings: InspectSettings) -> Iterator[str]:
    """Raises ValueError or FileNotFoundError with one sentence."""
    path, seq_len, seed = resolve_path(settings.path), settings.seq_len or 2048, settings.seed or 0
    if (path / "config.yaml").is_file():
        run = yaml.safe_load((path / "config.yaml").read_text())
        path = Path(run["data_path"])
        seq_len = settings.seq_len or run["train"]["seq_len"]
        seed = run["seed"] if settings.seed is None else settings.seed
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"path={path} is neither a run's folder nor one that data/prepare.py made"
        )
    tokenizer = load_tokenizer(path)
    [loader] = open_stages(path, [Stage(seq_len)], seed)
    yield f"{path}: {loader.padding_share:.2%} padding in sequences of {seq_len:,} tokens"
    for sample in range(settings.first, settings.first + settings.samples):
        batch = loader.batch(sample, 1)
        count = len(batch.cu_seqlens) - 1
        yield f"sample {sample:,}: {count} document" + "s" * (count != 1)
        yield from show(batch, tokenizer, settings.characters)


@hydra.main(version_base=None, config_path="../conf", config_name="inspect")
def main(config: DictConfig) -> None:
    try:
        for line in inspect(from_config(InspectSettings, config)):
            print(line)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
