"""Models whose behaviour is known, so that the score they deserve is known too."""

import random

import numpy as np


class Reader:
    """Sees the last `sight` tokens before each place, and answers from them alone.

    answer(text) is its reading of what it sees: the values that it would name. It ranks those first
    and tells them all; over token numbers, it goes on as the token before last went on when it was
    last seen.
    """

    def __init__(self, tokenizer, answer=None, sight=10**9):
        self.tokenizer, self.answer, self.sight = tokenizer, answer, sight

    def read(self, prompt):
        return self.answer(self.tokenizer.decode(prompt[-self.sight :]))

    def generate(self, prompts, max_new_tokens):
        answers = [" " + " ".join(self.read(p)) for p in prompts]
        return [self.tokenizer.encode(a).ids[:max_new_tokens] for a in answers]

    def score(self, prompts, candidates):
        return [
            [-0.1 if self.tokenizer.decode(c).strip() in self.read(p) else -9.0 for c in those]
            for p, those in zip(prompts, candidates, strict=True)
        ]

    def logprobs(self, sequences):
        return [self._recall(np.asarray(sequence)) for sequence in sequences]

    def _recall(self, tokens):
        logprobs, greedy, seen = np.full(len(tokens) - 1, -9.0, np.float32), [], {}
        for i, token in enumerate(tokens[:-1].tolist()):
            before = seen.get(token, -self.sight)
            greedy.append(i - before < self.sight and tokens[before + 1] == tokens[i + 1])
            seen[token] = i
        logprobs[greedy] = -0.1
        return logprobs, np.array(greedy)


class Guesser:
    """Never looks at the prompt."""

    def __init__(self, seed=0):
        self.rng = random.Random(seed)

    def generate(self, prompts, max_new_tokens):
        return [[] for _ in prompts]

    def score(self, prompts, candidates):
        return [[self.rng.random() for _ in those] for those in candidates]

    def logprobs(self, sequences):
        sizes = [len(s) - 1 for s in sequences]
        return [(np.full(n, -7.0, np.float32), np.zeros(n, bool)) for n in sizes]


class Indifferent(Guesser):
    def score(self, prompts, candidates):
        return [[-1.0 for _ in those] for those in candidates]


class Favourite(Guesser):
    """Has a taste in values, and follows it."""

    def score(self, prompts, candidates):
        return [
            [float(np.cos(np.dot(c, np.arange(len(c))))) for c in those] for those in candidates
        ]
