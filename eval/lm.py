"""What the evaluators ask of a language model: two functions, and our decoder behind them.

An evaluator takes anything with these two methods, so a test can plant any behaviour it likes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.cache import Cache
from model.decoder import Decoder
from model.generate import feed


class LanguageModel(Protocol):
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the stop token."""

    def score(self, prompt: list[int], candidates: Sequence[list[int]]) -> list[float]:
        """Log-probability, in nats, of each candidate as the continuation of the prompt."""


class DecoderLM:
    """Our decoder as a LanguageModel.

    Each prompt is read once: its cache stays, and every continuation starts again from its end.
    At most reserve tokens may follow a prompt.
    """

    def __init__(self, model: Decoder, stop_tokens: Collection[int], reserve: int = 256):
        self.model, self.stop_tokens, self.reserve = model, frozenset(stop_tokens), reserve
        self.device = model.embedding.weight.device
        self._prompt: list[int] = []

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        results = []
        for prompt in prompts:
            last, new = self._read(prompt), []
            while True:
                token = int(self.model.logits(last).argmax())
                if token in self.stop_tokens:
                    break
                new.append(token)
                if len(new) == max_new_tokens:
                    break
                last = self._feed([token])[-1]
            results.append(new)
        return results

    @torch.inference_mode()
    def score(self, prompt: list[int], candidates: Sequence[list[int]]) -> list[float]:
        scores = []
        for candidate in candidates:
            hidden = self._read(prompt)[None]
            if len(candidate) > 1:
                hidden = torch.cat([hidden, self._feed(candidate[:-1])])
            logprobs = self.model.logits(hidden).float().log_softmax(-1)
            target = torch.tensor(candidate, device=self.device)
            scores.append(float(logprobs.gather(1, target[:, None]).sum()))
        return scores

    def _read(self, prompt: list[int]) -> Tensor:
        """Stand at the end of the prompt; its last hidden state [dim]."""
        if prompt != self._prompt:
            self._cache = Cache(1, len(self.model.blocks), len(prompt) + self.reserve)
            self._last = self._feed(prompt)[-1].clone()
            self._end, self._prompt = self._cache.mark(), list(prompt)
        self._cache.rewind(self._end)
        return self._last

    def _feed(self, new: list[int]) -> Tensor:
        """Hidden states [len(new), dim] of tokens appended to the cache."""
        return feed(self.model, self._cache, [new])
