"""Generation: prefill the prompts, then one token per sequence and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model.cache import Cache
from model.decoder import Decoder

WARM_STEPS = 2  # what a Step does once: its first call compiles, its second is captured


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Iterable[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of the prompts, which may differ in length; the stop token is not returned.

    temperature 0 takes the most likely token; otherwise samples from the smallest set of tokens
    whose probability reaches top_p. Raises ValueError for an empty prompt.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, temperature, top_p, stop_tokens, seed):
        for result, token in zip(results, tokens, strict=True):
            if token is not None:
                result.append(token)
    return results


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Iterable[int] = (),
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """As generate, a step at a time: each prompt's next token, None once it has stopped."""
    if not all(prompts):
        raise ValueError("A prompt is empty; start it with the end-of-text token at least.")
    cache = Cache(len(prompts), len(model.blocks), max(map(len, prompts)) + max_new_tokens)
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    stop, running = set(stop_tokens), [True] * len(prompts)
    tokens = _sample(extend(model, cache, prompts), temperature, top_p, generator)
    step = None
    for i in range(max_new_tokens):
        if i:
            step = step or Step(model, cache, tokens, temperature, top_p, generator)
            tokens = step()
        chosen = tokens.tolist()
        running = [on and token not in stop for on, token in zip(running, chosen, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, chosen, strict=True)]


class Step:
    """One token for every sequence, fed by the tokens of the step before, all on the device.

    On CUDA the first call runs as it is, which compiles what it needs; the second is captured in a
    CUDA graph, which every later one replays.

    Attributes:
        tokens: int64 [B], what the next call feeds; set them to force a continuation.
        logits: [B, vocab] after the last call; valid until the next.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Cache,
        tokens: Tensor,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ):
        self.model, self.cache, self.generator = model, cache, generator
        self.sampling = (temperature, top_p)
        self.tokens = tokens.clone()
        self.positions = torch.tensor(cache.past, device=tokens.device)
        self.cu_seqlens = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def restart(self) -> None:
        """Go on from where the cache stands now, after it was rewound or filled anew."""
        self.positions.copy_(torch.tensor(self.cache.past))

    def __call__(self) -> Tensor:
        """The next tokens int64 [B]; valid until the next call."""
        ones = [1] * len(self.cache.past)
        self.cache.check(ones)
        if self.warm and self.graph is None and self.tokens.is_cuda:
            self._capture()
        if self.graph is None:
            self._run()
            self.warm = True
        else:
            self.graph.replay()
        self.cache.advance(ones)
        return self.tokens

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        self.cache.step((self.positions + 1).int())
        hidden = self.model.hidden(self.tokens, self.positions, self.cu_seqlens, 1, self.cache)
        self.logits = self.model.logits(hidden)
        self.tokens.copy_(_sample(self.logits, *self.sampling, self.generator))
        self.positions += 1


def extend(model: Decoder, cache: Cache, new: Sequence[Sequence[int]]) -> Tensor:
    """Feed each sequence its new tokens (at least one); logits [B, vocab] after the last of each."""
    last = torch.tensor([len(tokens) for tokens in new]).cumsum(0) - 1
    hidden = feed(model, cache, new)
    return model.logits(hidden[last.to(hidden.device)])


def feed(model: Decoder, cache: Cache, new: Sequence[Sequence[int]]) -> Tensor:
    """Append each sequence's new tokens to the cache; their hidden states [T, dim], packed."""
    device = model.embedding.weight.device
    counts = [len(tokens) for tokens in new]
    cache.check(counts)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    tokens = torch.tensor([t for tokens in new for t in tokens], device=device)
    starts = zip(counts, cache.past, strict=True)
    positions = torch.cat([torch.arange(start, start + n) for n, start in starts]).to(device)
    cache.step((positions + 1).int() if set(counts) == {1} else None)
    hidden = model.hidden(tokens, positions, cu_seqlens, max(counts), cache)
    cache.advance(counts)
    return hidden


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Logits [B, vocab] -> tokens int64 [B], without a look at the host."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p * (p.cumsum(-1) - p < top_p)  # always keeps the first
    # The largest p / e with e exponentially distributed falls on each token with probability p.
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return order.gather(1, choice)[:, 0]
