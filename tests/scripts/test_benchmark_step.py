"""What a step's profile says."""

import json
import os
import subprocess
import sys

import pytest
import torch

from data.config import ROOT
from scripts import benchmark_step
from scripts.benchmark_step import GpuClock, uncovered
from train.engine import Ranks


def test_time_in_no_span_is_counted_once_and_only_between_spans():
    assert uncovered([(5, 7), (0, 4), (1, 2), (9, 10)]) == 3
    assert uncovered([(0, 1)]) == uncovered([]) == 0


LINES = "1, 1, 1\\n1980, 100.5, 700.0\\n[N/A], 100.5, 700.0\\n1620, 699.5, 700.0\\n1620, 699.5, 7"


def test_clock_and_power_are_means_over_whole_lines_from_the_second_on():
    clock = GpuClock(torch.device("cpu"))
    with clock:
        pass
    assert clock.means() == {}
    clock.command = ["printf", LINES]
    with clock:
        clock.process.wait()
    assert clock.means() == {"clock_mhz": 1800, "power_w": 400, "power_limit_w": 700}


def test_what_can_not_be_measured_is_an_error(tmp_path, monkeypatch, capsys):
    def call(name):
        monkeypatch.setattr(
            sys, "argv", ["", "--out", str(tmp_path / "new/bench.json"), "--only", name]
        )
        with pytest.raises(SystemExit) as ended:
            benchmark_step.main()
        return ended.value.code

    assert (
        call("nsa at 3k") == 2
        and "there is no 'nsa at 3k'; choose among compiled" in capsys.readouterr().err
    )
    monkeypatch.setattr(benchmark_step, "start_process_group", lambda device: Ranks(device, 0, 1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no variant" in call("nsa at 64k") and "needs a CUDA GPU" in capsys.readouterr().out


def test_a_step_is_measured_and_profiled(tmp_path):
    small = "device=cpu attention=nsa_small model=tiny train.seq_len=256 train.batch_tokens=512"
    arguments = [
        "--out",
        tmp_path / "bench.json",
        "--steps",
        "1",
        "--only",
        "nsa small, 8 x 2k",
        "--",
    ]
    command = [sys.executable, "scripts/benchmark_step.py", *arguments, *small.split()]
    command.append("train.micro_batch_tokens=256")
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=no_gpu, check=True)
    (result,) = json.loads((tmp_path / "bench.json").read_text())["variants"].values()
    assert result["tokens_per_step"] == 512 and result["tokens_per_s"] > 0
    assert result["profiled_s"] > 0 and result["profiled_step_s"] > 0 and result["profile"]
