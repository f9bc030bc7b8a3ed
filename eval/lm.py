"""What the evaluators ask of a language model: three functions, and our decoder behind them.

An evaluator takes anything with these methods, so a test can plant any behaviour it likes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.cache import Cache
from model.decoder import Decoder
from model.generate import Step, feed

BATCH_TOKENS = 1 << 17  # read at once, over all sequences of a batch
LOGITS = 1 << 27  # held at once; 64k tokens times a large vocabulary would be tens of gigabytes


class LanguageModel(Protocol):
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the stop token."""

    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]
    ) -> list[list[float]]:
        """Log-probability, in nats, of each of a prompt's candidates as its continuation.

        Every prompt has the same number of candidates.
        """

    def logprobs(self, sequences: Sequence[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each sequence of n tokens, all but the first: log-probability given those before,
        float32 [n - 1], and whether it was the likeliest, bool [n - 1]."""


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> Iterator[slice]:
    """Consecutive sequences whose lengths sum to at most `limit`; a longer one is alone."""
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and total + length > limit:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))


class DecoderLM:
    """Our decoder as a LanguageModel.

    Prompts are read in batches, and the last batch's cache stays: every continuation of the same
    prompts starts again from their ends. The cache has room for `reserve` tokens after a prompt; more
    make it larger, for which the prompts are read again.
    """

    def __init__(self, model: Decoder, stop_tokens: Collection[int], reserve: int = 256):
        self.model, self.stop_tokens, self.reserve = model, frozenset(stop_tokens), reserve
        self.device = model.embedding.weight.device
        self._prompts: list[list[int]] = []
        self._cache: Cache | None = None
        self._unused = torch.Generator(self.device)  # nothing is sampled

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self._make_room(max_new_tokens)
        results: list[list[int]] = []
        for part in batches([len(p) for p in prompts]):
            results += self._continue(prompts[part], max_new_tokens)
        return results

    def _continue(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        tokens, results = self.model.logits(self._read(prompts)).argmax(-1), [[] for _ in prompts]
        running = [True] * len(prompts)
        self._step.tokens.copy_(tokens)
        for turn in range(max_new_tokens):
            if turn:
                tokens = self._step()
            for i, token in enumerate(tokens.tolist()):
                running[i] &= token not in self.stop_tokens
                if running[i]:
                    results[i].append(token)
            if not any(running):
                break
        return results

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]
    ) -> list[list[float]]:
        self._make_room(max((len(c) for those in candidates for c in those), default=0))
        results: list[list[float]] = []
        for part in batches([len(p) for p in prompts]):
            # Turn by turn, so that every prompt is continued by one candidate at a time.
            turns = zip(*candidates[part], strict=True)
            scores = [self._score(prompts[part], turn) for turn in turns]
            results += [list(row) for row in zip(*scores, strict=True)]
        return results

    def _score(self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]):
        """One continuation for each prompt -> its log-probability."""
        logits = self.model.logits(self._read(prompts))
        total = torch.zeros(len(prompts), device=self.device)
        lengths = torch.tensor([len(c) for c in continuations], device=self.device)
        # A shorter one is fed zeros past its end, which count nothing.
        targets = torch.tensor([*zip_longest(*continuations, fillvalue=0)], device=self.device)
        for turn, target in enumerate(targets):
            if turn:
                self._step.tokens.copy_(targets[turn - 1])
                self._step()
                logits = self._step.logits
            logprobs = logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]
            total += torch.where(turn < lengths, logprobs, 0.0)
        return total.tolist()

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        results = []
        for part in batches([len(s) for s in sequences]):
            lengths = [len(s) for s in sequences[part]]
            tokens = torch.tensor([t for s in sequences[part] for t in s], device=self.device)
            positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
            hidden = self.model.hidden(tokens, positions, cu_seqlens, max(lengths))
            found = self._against(hidden, tokens.roll(-1))
            logprobs, greedy = (x.cpu().split(lengths) for x in found)
            pairs = zip(logprobs, greedy, strict=True)
            results += [(p[:-1].numpy(), g[:-1].numpy()) for p, g in pairs]
        return results

    def _against(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, dim], target [T] -> log-probabilities, fp32 [T], and greedy hits, bool [T]."""
        rows = max(1, LOGITS // len(self.model.output_weight))
        logprobs, greedy = [], []
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True):
            logits = self.model.logits(h).float()
            logprobs.append(logits.log_softmax(-1).gather(1, t[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == t)
        return torch.cat(logprobs), torch.cat(greedy)

    def _make_room(self, new: int) -> None:
        if new > self.reserve:
            self.reserve, self._prompts = new, []

    def _read(self, prompts: Sequence[list[int]]) -> Tensor:
        """Stand at the ends of the prompts; their last hidden states [B, dim]."""
        if list(prompts) != self._prompts:
            self._prompts = []  # if reading fails, nothing is held
            self._make_cache(len(prompts), max(map(len, prompts)) + self.reserve)
            hidden = feed(self.model, self._cache, prompts)
            self._last = hidden[torch.tensor([len(p) for p in prompts]).cumsum(0) - 1]
            self._end, self._prompts = self._cache.mark(), list(prompts)
        self._cache.rewind(self._end)
        self._step.restart()
        return self._last

    def _make_cache(self, batch_size: int, room: int) -> None:
        """Empty, for so many sequences; the one at hand where it fits, with its CUDA graph."""
        cache = self._cache
        if cache and len(cache.past) == batch_size and room <= cache.max_length <= 2 * room:
            cache.reset()
            return
        self._cache = self._step = cache = None  # the old one makes room first
        self._cache = Cache(batch_size, len(self.model.blocks), room)
        tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._step = Step(self.model, self._cache, tokens, 0.0, 1.0, self._unused)
