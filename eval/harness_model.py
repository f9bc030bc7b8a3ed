"""A LanguageModel as lm_eval sees a model. Needs lm_eval, an optional package."""

from __future__ import annotations

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from data.tokenizer import end_of_text_id
from eval.lm import LanguageModel

DEFAULT_NEW_TOKENS = 256  # where a task does not say how long an answer may be


class HarnessLM(TemplateLM):
    """Scores and continues text for lm_eval's tasks, greedily.

    Args:
        max_length: tokens that the model reads at once; longer requests lose their beginning.
        document_start: end-of-text goes before every context, as before every document in training.
    """

    def __init__(
        self, lm: LanguageModel, tokenizer: Tokenizer, max_length: int, document_start: bool = True
    ):
        super().__init__()
        self.lm, self.encoder, self.max_length = lm, tokenizer, max_length
        self.document_start = document_start

    @property
    def eot_token_id(self) -> int:
        return end_of_text_id(self.encoder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self.encoder.encode(string, add_special_tokens=False).ids
        if self.document_start and add_special_tokens is not False:
            return [self.eot_token_id, *ids]
        return ids

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        # The longest read first, so that what does not fit in memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        # The last token is never read, hence one more than the model takes.
        asked = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in order]
        results: list = [None] * len(requests)
        for i, sequence, (logprobs, greedy) in zip(
            order, asked, self.lm.logprobs(asked), strict=True
        ):
            count = min(len(requests[i][2]), len(sequence) - 1)
            own = slice(len(logprobs) - count, None)
            results[i] = float(logprobs[own].sum()), bool(greedy[own].all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            own = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id,
                self.max_length, context_len=1,
            )  # fmt: skip
            own = [(("", ""), *make_disjoint_window(pair)) for pair in own]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[int, list[int]] = {}
        for i, (_, how) in enumerate(request.args for request in requests):
            if how.get("do_sample") and how.get("temperature", 1.0) > 0:
                raise ValueError("The task asks for sampled answers; only greedy ones are given.")
            groups.setdefault(how.get("max_gen_toks", DEFAULT_NEW_TOKENS), []).append(i)
        results = [""] * len(requests)
        for budget, members in groups.items():
            if budget >= self.max_length:
                raise ValueError(f"The task's answers of {budget} tokens need a longer max_length.")
            room = self.max_length - budget
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
            members.sort(key=lambda i: -len(prompts[i]))  # alike in length, little is padded
            answers = self.lm.generate([prompts[i] for i in members], budget)
            for i, tokens in zip(members, answers, strict=True):
                until = requests[i].args[1].get("until") or []
                results[i] = self.encoder.decode(tokens)
                for stop in [until] if isinstance(until, str) else until:
                    results[i] = results[i].partition(stop)[0] if stop else results[i]
        return results
