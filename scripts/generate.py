"""Continue a text: python scripts/generate.py checkpoint=outputs/quickstart prompt="It is a truth" """

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

from dataclasses import dataclass
from typing import Literal

import hydra
import torch
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from data.tokenizer import end_of_text_id
from model.checkpoint import load_checkpoint
from model.generate import stream


@dataclass(frozen=True)
class GenerateSettings:
    """conf/generate.yaml"""

    checkpoint: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    device: Literal["auto", "cpu", "cuda"]


@hydra.main(version_base=None, config_path="../conf", config_name="generate")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(GenerateSettings, config, "generate")
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = load_checkpoint(resolve_path(settings.checkpoint), device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    tokenizer = checkpoint.tokenizer
    eot = end_of_text_id(tokenizer)
    prompt = [eot, *tokenizer.encode(settings.prompt, add_special_tokens=False).ids]
    print(settings.prompt, end="", flush=True)
    tokens, shown = [], 0
    for (token,) in stream(
        checkpoint.model, [prompt], settings.max_new_tokens, settings.temperature, settings.top_p, [eot],
        settings.seed,
    ):  # fmt: skip
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # the bytes of one character may span several tokens
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
