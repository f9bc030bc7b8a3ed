"""Generation: prefill the prompts, then one token per sequence and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model.cache import Cache
from model.decoder import Decoder


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
    device = model.embedding.weight.device
    longest = max(map(len, prompts)) + max_new_tokens
    cache = Cache(len(prompts), len(model.blocks), longest)
    generator = torch.Generator(device).manual_seed(seed)
    stop, running = set(stop_tokens), [True] * len(prompts)
    new = [list(p) for p in prompts]
    for _ in range(max_new_tokens):
        logits = extend(model, cache, new)
        chosen = _sample(logits.float(), temperature, top_p, generator).tolist()
        running = [on and token not in stop for on, token in zip(running, chosen, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, chosen, strict=True)]
        new = [[token] for token in chosen]


def extend(model: Decoder, cache: Cache, new: Sequence[Sequence[int]]) -> Tensor:
    """Feed each sequence its new tokens (at least one); logits [B, vocab] after the last of each."""
    last = torch.tensor([len(tokens) for tokens in new]).cumsum(0) - 1
    hidden = feed(model, cache, new)
    return model.logits(hidden[last.to(hidden.device)])


def feed(model: Decoder, cache: Cache, new: Sequence[Sequence[int]]) -> Tensor:
    """Append each sequence's new tokens to the cache; their hidden states [T, dim], packed."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(tokens) for tokens in new])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    cache.check(cu_seqlens)
    tokens = torch.tensor([t for tokens in new for t in tokens], device=device)
    positions = torch.cat([torch.arange(len(n)) + p for n, p in zip(new, cache.past, strict=True)])
    longest = int(lengths.max())
    hidden = model.hidden(tokens, positions.to(device), cu_seqlens.to(device), longest, cache)
    cache.advance(cu_seqlens)
    return hidden


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Logits [B, vocab] -> tokens [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p * (p.cumsum(-1) - p < top_p)  # always keeps the first
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
