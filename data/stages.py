"""A prepared folder as the loaders of a run, one for each of its length stages.

The state of a run's data is two numbers, the stage and the samples consumed in it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.config import check_weights
from data.loader import PackedLoader
from data.mixture import MixedLoader
from data.shards import TokenShards
from data.synthetic import SyntheticLoader
from data.tokenizer import end_of_text_id, load_tokenizer
from data.tokenizer import fingerprint as tokenizer_fingerprint

MIXTURE = "mixture.json"  # in the folder of a prepared mixture, written by data.prepare
Loader = PackedLoader | SyntheticLoader | MixedLoader


class Stage(NamedTuple):
    """A part of a run with sequences of one length.

    seq_len  in tokens
    samples  how many sequences it takes; None in the last stage, which has no end
    weights  shares of the sources' tokens; None: the data config's
    """

    seq_len: int
    samples: int | None = None
    weights: Mapping[str, float] | None = None


def open_stages(path: Path, stages: Sequence[Stage], seed: int) -> list[Loader]:
    """The loader of each stage; one goes on with what those before it left unseen.

    Args:
        path: what data.prepare.prepare returned.
        seed: of the order; one number, from 0 up.

    Raises:
        ValueError: a length or a weight that can't be, in one sentence.
    """
    if not (path / MIXTURE).exists() and any(stage.weights for stage in stages):
        raise ValueError("weights: the data is a single source, which has none; leave them out")
    loaders = [_open(path, stages[0], seed)]
    for before, stage in zip(stages, stages[1:], strict=False):
        weights = () if stage.weights is None else (stage.weights,)
        loaders.append(loaders[-1].next_stage(stage.seq_len, before.samples, *weights))
    return loaders


def fingerprint(path: Path) -> str:
    """16 hex digits over all that a run reads: tokens, tokenizer, tasks, and the weights."""
    if not (path / MIXTURE).exists():
        return TokenShards.open(path / "train").fingerprint
    mixture = json.loads((path / MIXTURE).read_text())
    for source in mixture["sources"].values():
        if "folder" in source:
            source["folder"] = TokenShards.open(
                path.parent / source["folder"] / "train"
            ).fingerprint
    return hashlib.sha256(json.dumps(mixture, sort_keys=True).encode()).hexdigest()[:16]


def _open(path: Path, stage: Stage, seed: int) -> Loader:
    tokenizer = load_tokenizer(path / "tokenizer.json")
    eot_id, made_by = end_of_text_id(tokenizer), tokenizer_fingerprint(tokenizer)
    if not (path / MIXTURE).exists():
        return PackedLoader(TokenShards.open(path / "train", made_by), stage.seq_len, seed, eot_id)
    mixture = json.loads((path / MIXTURE).read_text())
    weights = mixture["weights"] if stage.weights is None else stage.weights
    check_weights(weights, list(mixture["sources"]))
    shards = {
        name: TokenShards.open(path.parent / source["folder"] / "train", made_by)
        for name, source in mixture["sources"].items()
        if "folder" in source
    }
    loaders: dict[str, Loader] = {}
    for name, source in mixture["sources"].items():
        if name in shards:
            loaders[name] = PackedLoader(shards[name], stage.seq_len, seed, eot_id)
        else:
            haystack = shards[source["haystack"]]
            loaders[name] = SyntheticLoader(
                haystack, tokenizer, source["tasks"], stage.seq_len, seed
            )
    return MixedLoader(loaders, weights)
