"""Several sources as one run of samples, each with its share of the tokens over any stretch."""

import heapq
from collections.abc import Mapping

import numpy as np

from data.batch import Batch, concatenate
from data.config import check_weights

PERIOD = 10_000  # samples after which the order of the sources repeats: a weight's precision


class MixedLoader:
    """Samples of several loaders in a fixed order of sources.

    Which source sample i comes from, and which of its samples it is, follow from i alone. In any
    stretch of the run a source's share of the samples is off by less than two samples.

    Args:
        loaders: by name, all of one seq_len.
        weights: shares of the tokens, in any scale; what a source pads is made up for in samples.

    Raises:
        ValueError: weights that no order of samples can follow.
    """

    def __init__(self, loaders: Mapping, weights: Mapping[str, float]):
        check_weights(weights, list(loaders))
        self.loaders, self.weights = dict(loaders), dict(weights)
        self._names = [name for name in loaders if weights.get(name)]
        used = [loaders[name] for name in self._names]
        self.seq_len = used[0].seq_len
        text = np.array([1 - loader.padding_share for loader in used])
        shares = np.array([weights[name] for name in self._names]) / text
        self._quotas = apportion(shares, PERIOD)
        if not self._quotas.all():
            least = self._names[self._quotas.argmin()]
            raise ValueError(
                f"data.weights.{least}: {weights[least]} is less than one sample in {PERIOD:,}; "
                "raise it, or set it to 0"
            )
        self._source = even_order(self._quotas)
        one_hot = self._source[:, None] == np.arange(len(used))
        self._before = np.concatenate([np.zeros((1, len(used)), np.int64), one_hot.cumsum(0)])
        padding = [loader.padding_share for loader in used]
        self.padding_share = float(self._quotas @ padding) / PERIOD

    def next_stage(
        self, seq_len: int, consumed: int, weights: Mapping[str, float] | None = None
    ) -> "MixedLoader":
        """Each source goes on where it stands after `consumed` samples of this mixture."""
        counts = dict(zip(self._names, self._counts(consumed), strict=True))
        loaders = {
            name: loader.next_stage(seq_len, int(counts.get(name, 0)))
            for name, loader in self.loaders.items()
        }
        return MixedLoader(loaders, self.weights if weights is None else weights)

    def describe(self, samples: int) -> str:
        """How often that many samples show each source."""
        return ", ".join(
            f"{name} {self.loaders[name].describe(int(count))}"
            for name, count in zip(self._names, self._counts(samples), strict=True)
        )

    def batch(self, first: int, count: int) -> Batch:
        """Samples first … first + count - 1, as count * seq_len tokens."""
        parts = []
        for sample in range(first, first + count):
            source = self._source[sample % PERIOD]
            index = int(self._counts(sample)[source])
            parts.append(self.loaders[self._names[source]].batch(index, 1))
        return concatenate(parts)

    def _counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source in use has given."""
        periods, rest = divmod(samples, PERIOD)
        return periods * self._quotas + self._before[rest]


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """`total` parted in proportion to the shares, in whole numbers: largest remainders go up."""
    exact = shares / shares.sum() * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def even_order(quotas: np.ndarray) -> np.ndarray:
    """An order of quotas.sum() items in which each kind is as even as can be.

    Item j of a kind with quota q of a total n is given a place in the window [j n / q,
    (j + 1) n / q); earliest deadline first finds such places for all (the scheduling theory's P-fair
    order, Baruah et al. 1996). So of the first i items less than one too many or too few are of any
    kind.

    Args:
        quotas: int64 [K], each 1 or more.

    Returns:
        int64 [n], the kind of each item.
    """
    total = int(quotas.sum())
    waiting = [(0, kind, 0) for kind in range(len(quotas))]  # released at, kind, number
    ready = []
    order = np.empty(total, np.int64)
    for place in range(total):
        while waiting and waiting[0][0] <= place:
            _, kind, number = heapq.heappop(waiting)
            deadline = -(-(number + 1) * total // int(quotas[kind]))
            heapq.heappush(ready, (deadline, kind, number))
        _, kind, number = heapq.heappop(ready)
        order[place] = kind
        if number + 1 < quotas[kind]:
            release = (number + 1) * total // int(quotas[kind])
            heapq.heappush(waiting, (release, kind, number + 1))
    return order
