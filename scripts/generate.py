"""Continue a text: python scripts/generate.py checkpoint=outputs/quickstart prompt="It is a truth" """

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import time
from dataclasses import dataclass
from typing import Literal

import hydra
import torch
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from data.tokenizer import end_of_text_id
from model.checkpoint import Checkpoint, load_checkpoint
from model.generate import WARM_STEPS, stream


@dataclass(frozen=True)
class GenerateSettings:
    """conf/generate.yaml"""

    checkpoint: str
    prompt: str
    prompt_file: str | None
    chat: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    device: Literal["auto", "cpu", "cuda"]

    def __post_init__(self):
        if self.prompt and self.prompt_file is not None:
            raise ValueError("generate: set prompt or prompt_file, not both.")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"generate.max_new_tokens={self.max_new_tokens}; it must be at least 1."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("generate: temperature must be at least 0, and 0 < top_p <= 1.")

    def text(self) -> str:
        """The text to continue. Raises FileNotFoundError."""
        if self.prompt_file is None:
            return self.prompt
        path = resolve_path(self.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"prompt_file={path}: there is no such file.")
        return path.read_text(encoding="utf-8")


@hydra.main(version_base=None, config_path="../conf", config_name="generate")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(GenerateSettings, config)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        text = settings.text()
        checkpoint = load_checkpoint(resolve_path(settings.checkpoint), device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    history = [end_of_text_id(checkpoint.tokenizer)]
    if not settings.chat or text:
        if settings.prompt_file is None:
            print(text, end="", flush=True)
        history = continue_text(checkpoint, history, text, settings)
    while settings.chat:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        history = continue_text(checkpoint, history, line + "\n", settings)


def continue_text(
    checkpoint: Checkpoint, history: list[int], text: str, settings: GenerateSettings
) -> list[int]:
    """Print what follows the tokens `history` and the text; return all of it as tokens.

    The speed goes to the error stream, so that the text alone can be kept.
    """
    tokenizer = checkpoint.tokenizer
    prompt = [*history, *tokenizer.encode(text, add_special_tokens=False).ids]
    new, shown, clock = [], 0, [time.perf_counter()]
    for (token,) in stream(
        checkpoint.model, [prompt], settings.max_new_tokens, settings.temperature, settings.top_p,
        [end_of_text_id(tokenizer)], settings.seed,
    ):  # fmt: skip
        clock.append(time.perf_counter())
        new.append(token)
        continuation = tokenizer.decode(new)
        if not continuation.endswith("\ufffd"):  # a character's bytes may span several tokens
            print(continuation[shown:], end="", flush=True)
            shown = len(continuation)
    print(flush=True)
    if new:
        compiles = checkpoint.model.embedding.weight.is_cuda and len(history) == 1
        print(speed(len(prompt), clock, compiles), file=sys.stderr)
    return [*prompt, *new]


def speed(prompt_tokens: int, clock: list[float], compiles: bool) -> str:
    """One line from the times, in seconds, at the start and at each new token.

    The rates leave out what happens once: a process compiles kernels for its first prompt, and the
    first steps after any prompt make the CUDA graph that the others replay.
    """
    prefill = clock[1] - clock[0]
    line = f"{prompt_tokens:,} prompt tokens in {prefill:.2f} s"
    if compiles:
        line += ", compilation of kernels included"
    else:
        line += f" ({prompt_tokens / prefill:,.0f} tokens/s)"
    if len(clock) > 2:
        line += f", then {len(clock) - 2:,} in {clock[-1] - clock[1]:.2f} s"
    steady = clock[1 + WARM_STEPS :]
    if len(steady) > 1:
        rate = (len(steady) - 1) / (steady[-1] - steady[0])
        line += f" (the last {len(steady) - 1:,} at {rate:,.0f} tokens/s)"
    return line


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
