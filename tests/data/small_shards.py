"""Shards of numbered tokens, which show where each one went."""

from pathlib import Path

import numpy as np

from data.shards import ShardWriter, TokenShards

EOT = 0


def write_shards(folder: Path, lengths: list[int], vocab_size: int = 1 << 20) -> TokenShards:
    """Documents of these many tokens; each token is its place in the file plus 1, or EOT."""
    writer = ShardWriter(folder, vocab_size, EOT, "a tokenizer")
    ends = np.cumsum(lengths)
    for end, length in zip(ends, lengths, strict=True):
        tokens = np.arange(end - length, end) + 1
        tokens[0] = EOT
        writer.add(tokens, num_bytes=3 * length)
    return writer.close()
