"""Without lm_eval, and with a task that it does not know: one sentence."""

import sys

import pytest

from eval.harness import HarnessSettings, run_harness
from model.checkpoint import load_checkpoint, save_weights
from tests.eval.test_needle import MODELS
from tests.eval.tiny import decoder


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    model = decoder(MODELS, tokenizer.get_vocab_size())
    save_weights(tmp_path, model.state_dict(), MODELS | {"train": {"seq_len": 512}}, tokenizer)
    return load_checkpoint(tmp_path)


SETTINGS = HarnessSettings(["chose"], None, None, None, True, None, None)


def test_without_the_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"\(lm_eval\): python -m pip install lm_eval$"):
        run_harness(checkpoint, SETTINGS)


def test_an_unknown_task(checkpoint):
    pytest.importorskip("lm_eval", reason="needs pip install lm_eval")
    with pytest.raises(ValueError, match="lm_eval has no task chose"):
        run_harness(checkpoint, SETTINGS)
