"""Losses that follow a known law of position come back as that law's means."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from data.tokenizer import end_of_text_id, token_bytes, vocab_size
from eval import position
from model.checkpoint import load_checkpoint, save_weights
from tests.eval.conftest import TEXT, run_script
from tests.eval.planted import Guesser
from tests.eval.test_needle import MODELS
from tests.eval.tiny import decoder


class Law:
    """A token's loss depends on the number of tokens before it, of which it sees `sight`."""

    def __init__(self, sight=10**9):
        self.sight = sight

    def loss(self, context):
        return 2 + 8 / np.minimum(context, self.sight)

    def logprobs(self, sequences):
        return [(-self.loss(np.arange(1, len(s))), np.zeros(len(s) - 1, bool)) for s in sequences]


@pytest.mark.parametrize(("sight", "n"), [(10**9, 256), (40, 256), (4096, 16384)])
def test_curves_are_the_law(sight, n):
    law, sizes = Law(sight), np.array([0, 1, 2, 3])
    windows = [[0, *np.random.default_rng(i).integers(1, 4, n - 1).tolist()] for i in range(3)]
    results = position.measure(law, windows, 32, sizes)
    lows = [row["position"] for row in results["by_position"]]
    assert lows == [2**i for i in range(n.bit_length() - 1)]
    for row in results["by_position"]:
        places = np.arange(row["position"], min(2 * row["position"], n))
        assert row["tokens"] == 3 * len(places)
        assert row["loss"] == pytest.approx(law.loss(places).mean(), abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-3)
    contexts = [row["context"] for row in results["by_context"]]
    assert contexts == [2**i for i in range(4, n.bit_length() - 1)] + [n - 32]
    for row in results["by_context"]:
        expected = law.loss(row["context"] + np.arange(32)).mean()
        assert row["tokens"] == 96 and row["loss"] == pytest.approx(expected, abs=1e-5)
    total = 3 * law.loss(np.arange(1, n)).sum()
    num_bytes = sizes[np.array(windows)].sum()
    assert results["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes)
    beyond = {row["loss"] for row in results["by_context"] if row["context"] >= sight}
    assert len(beyond) == (sight < n)  # more context than it sees changes nothing


def test_one_that_does_not_read_is_flat():
    results = position.measure(Guesser(), [[0] + [1] * 127], 16, np.array([0, 1]))
    assert {r["loss"] for k in ("by_position", "by_context") for r in results[k]} == {7.0}


def test_windows_come_from_documents_that_are_long_enough():
    documents = [np.arange(1, n) for n in (4, 30, 9, 21)]
    windows = position.cut_windows(iter(documents), 10, 99, end=0)
    assert windows == [[0, *range(a, a + 9)] for a in (1, 10, 19, 1, 10)]
    assert position.cut_windows(iter(documents), 10, 2, end=0) == windows[:2]
    with pytest.raises(ValueError, match="length=99 tokens; the longest has 30"):
        position.cut_windows(iter(documents), 99, 1, end=0)


def test_the_script_on_a_decoder_that_knows_nothing(tmp_path, tokenizer):
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    model = decoder(MODELS, vocab_size(tokenizer))
    with torch.no_grad():
        model.norm.weight.zero_()  # every token alike
    save_weights(folder, model.state_dict(), MODELS, tokenizer)
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    script = partial(
        run_script, "eval/position.py", f"checkpoint={tmp_path / 'run'}", f"haystack={text}",
        "length=256", "windows=3",
    )  # fmt: skip
    done = script("targets=64")
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "run" / "eval" / "position" / "step_00000007"
    results = json.loads(stem.with_suffix(".json").read_text())
    uniform = math.log(vocab_size(tokenizer))
    losses = [row["loss"] for key in ("by_position", "by_context") for row in results[key]]
    assert losses == pytest.approx([uniform] * len(losses), abs=1e-4)
    checkpoint = load_checkpoint(folder)
    ids = tokenizer.encode(TEXT).ids[: 3 * 255]
    sizes = token_bytes(checkpoint.tokenizer)[ids]
    assert results["bits_per_byte"] == pytest.approx(
        uniform * 765 / math.log(2) / sizes.sum(), rel=1e-4
    )
    assert stem.with_suffix(".csv").read_text().startswith("position,tokens,loss")
    assert end_of_text_id(tokenizer) == 0
    done = script("targets=250")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "targets=250" in done.stderr
