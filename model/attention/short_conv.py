"""A short causal convolution over tokens as a module: its weights, its cache, its neighbours.

On keys and values it lets one token know its neighbours before any attention: what followed a key
can be found with the key (arXiv 2212.14052, section 3; for sparse attention 2511.11571).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.short_conv import short_conv, short_conv_step
from model.cache import LayerCache
from model.parallel import HeadExchange


class ShortConv(nn.Module):
    """y_t = sum_j weight_j * x_(t - j), j < width, over tokens of t's document; starts as identity.

    Raises ValueError for a width below 2.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        if width < 2:
            raise ValueError(f"model.kv_conv={width}; give it 2 tokens or more, or 0 for none.")
        self.weight = nn.Parameter(torch.eye(width, 1).repeat(1, channels))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        cache: LayerCache | None,
        exchange: HeadExchange | None,
        name: str,
    ) -> Tensor:
        """x [T, C] -> [T, C]; positions int64 [T] are counted from the documents' first tokens.

        With a cache, x holds the new tokens of its sequences, delimited by cu_seqlens [B + 1], and
        the last width - 1 tokens before them are kept there under `name`; with an exchange, x is
        this rank's stretch of the tokens.
        """
        reach = len(self.weight) - 1
        if cache is not None:
            return self._with_cache(x, positions, cu_seqlens, cache, name)
        if exchange is None:
            return short_conv(x, self.weight, positions)
        x = torch.cat([exchange.rows_before(x, reach), x])
        return short_conv(x, self.weight, F.pad(positions, (reach, 0)))[reach:]

    def _with_cache(self, x, positions, cu_seqlens, cache, name) -> Tensor:
        reach = len(self.weight) - 1
        kept = cache.recent_rows(name, reach, x)  # [B, reach, C], token t in row t % reach
        if cache.lengths is not None:
            return short_conv_step(x, self.weight, kept, cache.lengths)
        tokens = torch.arange(len(x), device=x.device)
        sequence = torch.searchsorted(cu_seqlens, tokens.int(), right=True) - 1
        new_before = tokens - cu_seqlens[sequence]
        rows = torch.cat([kept.flatten(0, 1), x])
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.weight[0].to(wide) * x
        for j in range(1, reach + 1):
            old = sequence * reach + (positions - j) % reach
            earlier = rows[torch.where(new_before >= j, len(rows) - len(x) + tokens - j, old)]
            y = y + self.weight[j].to(wide) * torch.where((positions >= j)[:, None], earlier, 0)
        cache.write([kept], [x], cu_seqlens)
        return y.to(x.dtype)
