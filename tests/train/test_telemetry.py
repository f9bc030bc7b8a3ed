"""What a person sees while a run trains."""

from train.config import LogConfig
from train.telemetry import Telemetry


def lines(folder, capsys, first, seconds, lengths):
    """The speeds and MFUs printed, every second step, of steps from `first` on, of 60 tokens each."""
    log = LogConfig(every=2, wandb="disabled", wandb_project="", profile=None)
    telemetry = Telemetry(folder, {}, log, num_steps=99, active=True)
    for step, (time, length) in enumerate(zip(seconds, lengths, strict=True), start=first):
        parts = {"seconds/forward": time / 4, "seconds/backward": 3 * time / 4}
        rates = {"tokens_per_s": 60 / time, "mfu": 0.5 / time, "seq_len": length}
        telemetry.progress({"step": step, "loss": 2.0, **rates, **parts}, seconds_left=0)
    telemetry.close()
    return [line.split("  ")[2:4] for line in capsys.readouterr().out.splitlines()]


def test_a_line_tells_the_speed_since_the_line_before(tmp_path, capsys):
    assert lines(tmp_path, capsys, 1, [100, 1, 3, 4], [8] * 4) == [
        ["1 tok/s", "MFU 0.5%"],
        ["60 tok/s", "MFU 50.0%"],  # the first step, which compiles, is not in it
        ["17 tok/s", "MFU 14.3%"],  # 120 tokens in 7 s
    ]


def test_steps_that_compile_do_not_slow_a_line(tmp_path, capsys):
    resumed_then_longer = lines(tmp_path, capsys, 11, [100, 2, 100, 4, 5, 6], [8, 8, 9, 9, 9, 7])
    assert [speed for speed, _ in resumed_then_longer] == ["30 tok/s", "15 tok/s", "10 tok/s"]
