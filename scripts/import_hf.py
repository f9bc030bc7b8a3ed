"""A Hugging Face model as a checkpoint that every script here reads:

    python scripts/import_hf.py hf_path=~/models/SmolLM2-135M checkpoint=outputs/smollm2

Takes plain Llama, Qwen3 and Mistral models, and what scripts/export_hf.py wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from model.checkpoint import load_checkpoint
from model.export import import_hf


@dataclass(frozen=True)
class ImportSettings:
    """conf/import_hf.yaml"""

    hf_path: str
    checkpoint: str


@hydra.main(version_base=None, config_path="../conf", config_name="import_hf")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(ImportSettings, config)
        folder = import_hf(resolve_path(settings.hf_path), resolve_path(settings.checkpoint))
        model = load_checkpoint(folder).model
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"imported    {folder}, {model.num_parameters() / 1e6:.1f}M parameters")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
