"""What a prepared corpus holds, in numbers: for summary.json, and as a table for the person."""

from pathlib import Path

import numpy as np

from data.shards import TokenShards

LONG = (8 << 10, 32 << 10, 64 << 10)
HISTOGRAM = [0, *(1 << power for power in range(8, 21))]  # tokens: below 256, then by powers of two


def describe(shards: TokenShards) -> dict:
    """Sizes and lengths of one side of a corpus."""
    lengths = np.diff(shards.offsets)
    counts, _ = np.histogram(lengths, [*HISTOGRAM, np.inf])
    tokens, _ = np.histogram(lengths, [*HISTOGRAM, np.inf], weights=lengths)
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
        "histogram": [
            {"from": low, "documents": int(count), "tokens": int(total)}
            for low, count, total in zip(HISTOGRAM, counts, tokens, strict=True)
        ],
    }


def table(folder: Path, summary: dict) -> str:
    """The summary of a corpus from text, some twenty lines."""
    train, validation = summary["train"], summary["validation"]
    lines = [f"data: {folder}", f"  {summary['split']}"]
    lines += [f"  left out, {what}" for what in _left_out(summary)]
    if summary["commit"]:
        lines += [f"  from commit {summary['commit']} of the dataset"]
    lines += [f"  vocabulary of {summary['tokenizer']['vocab_size']:,} tokens"]
    if seconds := summary["seconds"]:
        rate = (train["bytes"] + validation["bytes"]) / seconds / 1e6
        workers = f"{summary['workers']} worker" + "s" * (summary["workers"] != 1)
        lines += [f"  made in {seconds:,.1f} s by {workers}, {rate:.1f} MB/s"]
    rows = [("", "train", "validation")]
    rows += [
        (label, f"{train[key]:{form}}", f"{validation[key]:{form}}")
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
            f"tokens in documents > {length >> 10}k",
            _share(train, length),
            _share(validation, length),
        )
        for length in LONG
    ]
    lines += [f"  {label:<26}{left:>16}{right:>16}" for label, left, right in rows]
    return "\n".join([*lines, *_histogram(train)])


def mixture_table(folder: Path, summary: dict) -> str:
    """A line for each source of a mixture."""
    lines = [
        f"data: {folder}",
        f"  {'source':<16}{'weight':>8}{'documents':>12}{'tokens':>16}{'> 64k':>8}",
    ]
    total = sum(summary["weights"].values())
    for name, source in summary["sources"].items():
        weight = summary["weights"].get(name, 0) / total
        numbers = "  made while training"
        if "train" in source:
            train = source["train"]
            share = _share(train, LONG[-1])
            numbers = f"{train['documents']:>12,}{train['tokens']:>16,}{share:>8}"
        lines.append(f"  {name:<16}{weight:>8.1%}{numbers}")
        lines += [f"  {'':<16}left out, {what}" for what in _left_out(source)]
    validation = summary["validation"]
    lines.append(
        f"  validation: {validation['documents']:,} documents, {validation['tokens']:,} tokens"
    )
    return "\n".join(lines)


def _left_out(summary: dict) -> list[str]:
    """What of a source was not taken; nothing for tasks."""
    found = []
    if ignored := summary.get("ignored_files"):
        kinds = ", ".join(f"{n} {kind}" for kind, n in ignored.items())
        found.append(f"not a kind that is read: {kinds}")
    if counts := [f"{n:,} {kind}" for kind, n in summary.get("duplicates", {}).items() if n]:
        found.append(f"documents that were there before: {', '.join(counts)}")
    return found


def _share(side: dict, length: int) -> str:
    return f"{side['share_of_tokens_in_documents_over'][str(length)]:.1%}"


def _histogram(side: dict) -> list[str]:
    """How the training tokens are spread over lengths of documents, as bars."""
    lines = ["  training tokens by length of their document, in tokens"]
    filled = [i for i, bin in enumerate(side["histogram"]) if bin["tokens"]]
    for bin in side["histogram"][filled[0] : filled[-1] + 1]:
        share = bin["tokens"] / side["tokens"]
        bar = "#" * round(32 * share)
        lines.append(f"  {bin['from']:>12,}+ {share:>6.1%} {bar}")
    return lines
