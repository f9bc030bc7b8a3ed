"""What a person sees while a run trains."""

from train.config import LogConfig
from train.telemetry import Telemetry


def test_a_line_tells_the_speed_since_the_line_before(tmp_path, capsys):
    log = LogConfig(every=2, wandb="disabled", wandb_project="", profile=None)
    telemetry = Telemetry(tmp_path, {}, log, num_steps=5, active=True)
    seconds = [100, 1, 3, 4, 1]  # of steps of 60 tokens; the first compiles
    for step, time in enumerate(seconds, start=1):
        parts = {"seconds/forward": time / 4, "seconds/backward": 3 * time / 4}
        rates = {"tokens_per_s": 60 / time, "mfu": 0.5 / time}
        telemetry.progress({"step": step, "loss": 2.0, **rates, **parts}, seconds_left=0)
    telemetry.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2:4] for line in lines] == [
        ["1 tok/s", "MFU 0.5%"],
        ["60 tok/s", "MFU 50.0%"],  # the first step's time is not in it
        ["17 tok/s", "MFU 14.3%"],  # 120 tokens in 7 s
        ["60 tok/s", "MFU 50.0%"],
    ]
