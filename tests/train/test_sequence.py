"""Sequence parallelism: ranks that share a sequence do together what one does alone."""

import pytest

from tests.train.ranks import pretrain, start
from tests.train.test_run import same_curve, weights

LONG = ["train.seq_len=512", "train.micro_batch_tokens=512", "model.kv_conv=4"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder with a run alone for each attention."""
    folder = tmp_path_factory.mktemp("outputs")
    for attention in ("full", "nsa_small", "sliding"):
        pretrain(folder, f"name={attention}", f"attention={attention}", *LONG)
    return folder


@pytest.mark.parametrize(
    "attention, stage, world_size",
    [(a, stage, 2) for a in ("full", "nsa_small") for stage in (0, 1, 2, 3)]
    + [("nsa_small", 1, 4), ("sliding", 1, 2)],
)
def test_ranks_that_share_sequences_follow_one_process(outputs, attention, stage, world_size):
    """On four ranks two pairs take a sequence each."""
    name = f"{attention}_{stage}_{world_size}"
    pretrain(
        outputs, f"name={name}", f"attention={attention}", f"parallel=zero{stage}",
        "parallel.sequence=2", *LONG, world_size=world_size,
    )  # fmt: skip
    same_curve(outputs / attention, outputs / name, rel=1e-5)
    alone, together = weights(outputs / attention), weights(outputs / name)
    for key, weight in alone.items():
        assert (weight - together[key]).norm() < 1e-5 * weight.norm() + 1e-6, key


def test_the_mlp_of_the_compression_is_shared_too(outputs):
    how = ["attention=nsa_small", "attention.compression=mlp", *LONG]
    pretrain(outputs, "name=mlp", *how)
    pretrain(outputs, "name=mlp2", "parallel.sequence=2", *how, world_size=2)
    same_curve(outputs / "mlp", outputs / "mlp2", rel=1e-5)


def test_ranks_that_do_not_divide_are_told(tmp_path):
    run = start(tmp_path, "name=odd", "parallel.sequence=2", *LONG, world_size=1)
    assert run.wait() == [1]
    assert "parallel.sequence=2 does not divide the 1 ranks" in run.text()
