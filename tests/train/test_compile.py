"""Compiled blocks: the same numbers, one graph each, and no new one for each batch's documents."""

import pytest

from tests.train.ranks import Run, config, pretrain
from tests.train.test_run import metrics
from train.config import missing_for_cpu_compile

SHORT = [
    "model.num_layers=1", "model.num_heads=8", "model.kv_conv=4", "train.max_steps=3",
    "train.validate_every=100",
]  # fmt: skip
# Several documents a batch, in varying number.
DOCUMENTS = ["train.seq_len=128", "train.micro_batch_tokens=512"]


def _counting(raw: dict) -> int:
    from torch._dynamo.utils import counters

    from model.layers import PROJECTED_AT_ONCE
    from train.pretrain import pretrain

    PROJECTED_AT_ONCE.add("cpu")  # as compiled for a GPU
    status = pretrain(raw)
    print("graphs", counters["stats"]["unique_graphs"])
    return status


MISSING = missing_for_cpu_compile()


@pytest.mark.skipif(MISSING is not None, reason=f"needs {MISSING}")
@pytest.mark.parametrize("attention", ["full", "nsa_small"])
@pytest.mark.parametrize("recompute", ["selective"])
def test_compiled_blocks_follow_the_loop_without(tmp_path, attention, recompute):
    how = [f"attention={attention}", *SHORT, *DOCUMENTS]
    pretrain(tmp_path, "name=eager", *how)
    raw = config(
        f"output_dir={tmp_path}", "name=compiled", "train.compile=true", *how,
        f"train.activation_checkpointing={recompute}",
    )  # fmt: skip
    run = Run(_counting, raw, tmp_path / "log")
    assert run.wait() == [0], run.text()
    graphs = int(run.text().split("graphs")[1])
    assert graphs <= 3  # training, a second document count, validation
    for one, two in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
