"""Documents of a Hugging Face dataset, by name or by the path of a local copy, through `datasets`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.config import HubConfig
from data.sources import BATCH, check_column


def pinned(config: HubConfig, where: str) -> str | None:
    """The commit that the revision stands for now; None for a folder on this machine.

    Raises:
        ConnectionError: the hub can't be reached or has no such dataset, and the way around that.
    """
    if Path(config.name).expanduser().is_dir():
        return None
    from huggingface_hub import HfApi

    print(f"{where}.hub: reading {config.name} from the Hugging Face hub", flush=True)
    with _explained(config, where):
        return HfApi().dataset_info(config.name, revision=config.revision, timeout=30).sha


def read_rows(
    config: HubConfig, commit: str | None, text_field: str, where: str,
    position: dict | None = None,
) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """Each row's text and the position behind it, from which a later call goes on.

    Args:
        commit: what `pinned` found.
        text_field: the column with the text.
        where: the config group, for messages.
        position: a few numbers in a dict, for JSON; None is the start.

    Raises:
        ConnectionError: as `pinned` does.
        ValueError: there is no such split, subset or column.
    """
    import datasets  # takes a second

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or opening a local copy calls the hub
    with _explained(config, where):
        rows = datasets.load_dataset(
            os.path.expanduser(config.name),
            config.subset,
            split=config.split,
            revision=commit,
            streaming=config.streaming,
        )
        if not config.streaming:
            rows = rows.to_iterable_dataset()
        rows = rows.with_format("arrow")
        position = position or {"state": rows.state_dict(), "row": 0}
        rows.load_state_dict(position["state"])
        state, skip = position["state"], position["row"]
        for table in rows.iter(BATCH):
            check_column(text_field, table.column_names)
            for row, text in enumerate(table[text_field].to_pylist()[skip:], skip + 1):
                yield text or "", {"state": state, "row": row}
            state, skip = rows.state_dict(), 0


@contextmanager
def _explained(config: HubConfig, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if isinstance(error, ValueError):  # no such split, subset or column
            raise ValueError(f"{where}.hub: {config.name}: {reason}") from error
        raise ConnectionError(
            f"{where}.hub: the dataset {config.name} can't be read ({reason}); with its files on "
            f"this machine, set {where}.path=/folder/of/them (parquet or jsonl)"
        ) from error
