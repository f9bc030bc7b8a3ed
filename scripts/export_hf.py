"""A checkpoint for Hugging Face transformers:

    python scripts/export_hf.py checkpoint=outputs/quickstart hf_path=outputs/quickstart/hf

Writes safetensors, config and tokenizer. Where the decoder is one of transformers' own it opens as
that; otherwise a modelling file goes with it, for trust_remote_code=True.
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
from model.export import export


@dataclass(frozen=True)
class ExportSettings:
    """conf/export_hf.yaml"""

    checkpoint: str
    hf_path: str


@hydra.main(version_base=None, config_path="../conf", config_name="export_hf")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(ExportSettings, config)
        folder = resolve_path(settings.hf_path)
        name = export(load_checkpoint(resolve_path(settings.checkpoint)), folder)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    remote = ", trust_remote_code=True" if name.startswith("NsaLm") else ""
    print(f"exported    {folder}, {name}")
    for opens in ("AutoModelForCausalLM", "AutoTokenizer"):
        print(f"open it     {opens}.from_pretrained('{folder}'{remote})")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
