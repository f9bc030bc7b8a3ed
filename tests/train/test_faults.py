"""What a run must survive. KILLS=30 tries thirty random moments instead of five."""

import gzip
import json
import os
import random
import resource
import signal
import time

import pytest
import torch

from tests.train.ranks import Run, config, pretrain, start
from tests.train.test_run import metrics, same_weights, weights
from train.faults import WINDOW, spike

KILLS = int(os.environ.get("KILLS", 5))
LONG = ["train.max_tokens=1_000_000", "train.validate_every=1000"]


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path):
    often = ["train.checkpoint_every=1"]
    pretrain(tmp_path, "name=first")  # prepares the data
    began = time.monotonic()
    pretrain(tmp_path, "name=whole", *often)
    whole = time.monotonic() - began
    rng, kills, sittings = random.Random(0), 0, 0
    while True:
        run = start(tmp_path, f"name=killed{sittings}", "train.resume=auto", *often)
        if kills < KILLS:
            time.sleep(rng.uniform(0.1, 0.95) * whole)
            if run.ranks[0].is_alive():
                run.kill()
                kills += 1
                continue
        assert run.wait() == [0], run.text()
        same_weights(weights(tmp_path / "whole"), weights(tmp_path / f"killed{sittings}"))
        losses = [[m["step"], m["loss"]] for m in metrics(tmp_path / "whole") if "loss" in m]
        name = f"killed{sittings}"
        assert losses == [[m["step"], m["loss"]] for m in metrics(tmp_path / name) if "loss" in m]
        sittings += 1  # a run that ended leaves the rest of the kills to the next
        if kills == KILLS:
            break


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_on_one_rank_stops_all_within_a_step(tmp_path, number):
    """In the middle of a step of 64 passes, or of a validation."""
    how = ["train.batch_tokens=16384", *LONG]
    if number == signal.SIGINT:
        how = [*LONG, "train.validate_every=1", "train.validation_tokens=null"]
    run = start(tmp_path, "name=stopped", "train.seq_len=128", *how, world_size=2)
    run.wait_for("step 1/")
    time.sleep(0.2)
    run.signal(number, rank=1)
    assert run.wait(30) == [128 + number] * 2, run.text()
    assert f"stopped by signal {int(number)}" in run.text() and "Traceback" not in run.text()
    assert list((tmp_path / "stopped/checkpoints").glob("step_*/state.json"))


def test_an_interrupted_validation_is_made_up_for(tmp_path):
    run = start(
        tmp_path,
        "name=cut",
        "train.validation_tokens=null",
        "train.seq_len=64",
        "train.max_steps=3",
    )
    run.wait_for("step 1/")
    while (
        run.ranks[0].is_alive() and '"step": 3' not in (tmp_path / "cut/metrics.jsonl").read_text()
    ):
        time.sleep(0.005)
    run.signal(signal.SIGTERM)
    run.wait()
    pretrain(tmp_path, "name=cut", "train.validation_tokens=null", "train.seq_len=64", "train.max_steps=3",
             "train.resume=auto")  # fmt: skip
    assert [m["step"] for m in metrics(tmp_path / "cut") if "val/loss" in m] == [3]
    assert [m["step"] for m in metrics(tmp_path / "cut") if "loss" in m] == [1, 2, 3]


def test_a_killed_rank_is_a_clear_end(tmp_path):
    run = start(tmp_path, "name=lost", "train.checkpoint_every=1", *LONG, world_size=2)
    run.wait_for("step 10/")
    run.signal(signal.SIGKILL, rank=1)
    assert run.wait(60) == [1, -signal.SIGKILL]
    assert "Another rank has ended" in run.text() and "Traceback" not in run.text()
    pretrain(tmp_path, "name=lost", "train.resume=true", "train.max_steps=30")


def _with_bad_steps(raw: dict) -> int:
    """Rank 1's gradients are not numbers in steps 3 and 4."""
    import torch.distributed as dist

    from train.engine import Engine
    from train.pretrain import pretrain

    backward, calls = Engine.backward, [0]

    def poisoned(self, loss):
        calls[0] += 1
        bad = (calls[0] - 1) // 2 in (2, 3) and dist.get_rank() == 1
        backward(self, loss._replace(objective=loss.objective * float("nan")) if bad else loss)

    Engine.backward = poisoned
    return pretrain(raw)


@pytest.mark.parametrize(
    "stage, precision",
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")],
)
def test_a_step_that_is_not_a_number_is_skipped_on_all_ranks(tmp_path, stage, precision):
    raw = config(
        f"output_dir={tmp_path}", "name=bad", f"parallel=zero{stage}",
        f"train.precision={precision}", "train.max_skipped=3",
    )  # fmt: skip
    run = Run(_with_bad_steps, raw, tmp_path / "log", world_size=2)
    assert run.wait() == [0, 0], run.text()
    assert run.text().count("skipped: the gradient norm is inf") == 2
    training = [m for m in metrics(tmp_path / "bad") if "loss" in m]
    assert [m["skipped"] for m in training] == [0, 0, 1, 2, 2, 2]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "bad").values())
    assert training[-1]["loss"] < training[0]["loss"]


def test_too_many_bad_steps_end_the_run_and_keep_the_batch(tmp_path):
    raw = config(f"output_dir={tmp_path}", "name=bad", "train.max_skipped=2")
    run = Run(_with_bad_steps, raw, tmp_path / "log", world_size=2)
    assert run.wait() == [1, 1]
    assert "2 steps in a row were skipped" in run.text() and "Traceback" not in run.text()
    batch = torch.load(tmp_path / "bad/skipped_step_00000004.pt", weights_only=True)
    assert batch["tokens"].shape == (1024,)


def _with_small_files(raw: dict) -> int:
    """No file may grow beyond 100 kB: a disk that fills up while a checkpoint is written."""
    from train.pretrain import pretrain

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return pretrain(raw)


def _without_space(raw: dict) -> int:
    import shutil

    from train.pretrain import pretrain

    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=1000)
    return pretrain(raw)


@pytest.mark.parametrize(
    "target, words", [(_with_small_files, "could not be written"), (_without_space, "0.00 GB left")]
)
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path, target, words):
    pretrain(tmp_path, "name=full", "train.max_steps=2")
    before = weights(tmp_path / "full", 2)
    run = Run(
        target, config(f"output_dir={tmp_path}", "name=full", "train.resume=true"), tmp_path / "log"
    )
    assert run.wait() == [1], run.text()
    assert words in run.text() and "Traceback" not in run.text()
    same_weights(before, weights(tmp_path / "full", 2))
    pretrain(tmp_path, "name=full", "train.resume=true", "train.max_steps=3")


def test_checkpoints_kept_are_the_newest_and_the_multiples(tmp_path):
    pretrain(
        tmp_path, "name=kept", "train.checkpoint_every=1", "train.keep_checkpoints=1",
        "train.keep_every=2", "train.max_steps=5", "train.background_checkpoints=true",
        world_size=2,
    )  # fmt: skip
    kept = sorted(p.name for p in (tmp_path / "kept/checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    state = json.loads((tmp_path / "kept/checkpoints/step_00000005/state.json").read_text())
    assert state["updates"] == 5 and state["code"] and state["data"]


def test_a_spike_is_measured_against_the_recent_steps():
    rng = random.Random(0)
    recent = [[3 + rng.gauss(0, 0.1), 1 + rng.gauss(0, 0.1)] for _ in range(WINDOW)]
    assert spike(3.2, 1.2, recent, sigma=6) is None
    assert "the loss 4 is above" in spike(4.0, 1.0, recent, sigma=6)
    assert "the gradient norm 2 is above" in spike(3.0, 2.0, recent, sigma=6)
    assert spike(4.0, 2.0, recent, sigma=0) is None
    assert spike(4.0, 2.0, recent[: WINDOW // 2 - 1], sigma=6) is None  # too early to tell
    assert "the loss is nan" in spike(float("nan"), 1.0, recent, sigma=0)


def test_chosen_steps_leave_a_trace(tmp_path):
    pretrain(tmp_path, "name=traced", "log.profile=[2,3]", "train.max_steps=4")
    trace, table = (tmp_path / f"traced/profile/steps_2_3.{end}" for end in ("json.gz", "txt"))
    assert b"nsa::attention" in gzip.decompress(trace.read_bytes())
    assert "nsa::attention_backward" in table.read_text()
