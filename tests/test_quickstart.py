"""The quickstart, shrunk: every command of the Makefile's target, in order, on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

from eval.position import PositionSettings, run_position
from eval.recall import RecallSettings, run_recall
from eval.report import write_report
from eval.ruler import RulerSettings, run_ruler
from model.checkpoint import load_checkpoint
from model.export import export
from tests.train.ranks import SMALL

ROOT = Path(__file__).resolve().parents[1]


def test_raw_text_to_a_scored_checkpoint_and_a_report(tmp_path):
    recipe = (ROOT / "Makefile").read_text().split("\nquickstart:")[1].split("\n\n")[0]
    commands = re.findall(r"^\t\$\(PY\) (.+)$", recipe, re.MULTILINE)
    assert [c.split()[0] for c in commands] == [
        "train/pretrain.py", "eval/baseline.py", "eval/needle.py", "eval/report.py",
    ]  # fmt: skip
    run = tmp_path / "quickstart"
    shrunk = [a for a in SMALL if not a.startswith(("optimizer", "parallel"))]
    small = [
        *shrunk,
        "eval.lengths=[128,256]",
        "eval.depths=2",
        "eval.samples=1",
        "log.wandb=offline",
    ]
    for command in commands:
        script, *arguments = command.replace("outputs/quickstart", str(run)).split()
        if script == "train/pretrain.py":
            arguments += [a for a in small if not a.startswith("+")] + [f"output_dir={tmp_path}"]
        result = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    needle = json.loads(next((run / "eval/needle").glob("step_*.json")).read_text())
    assert len(needle["samples"]) == 4
    assert next((run / "eval/needle").glob("*.png")).read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "order-2" in page and "http://" not in page and "https://" not in page
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 2  # training, needle

    # What else there is to score a checkpoint with, on its held-out text.
    checkpoint = load_checkpoint(run)
    tasks = ["niah_single_2", "fwe"]
    ruler = run_ruler(checkpoint, RulerSettings([2048], 1, tasks, 0, None, None, None))
    assert [cell["task"] for cell in ruler["cells"]] == tasks
    position = run_position(checkpoint, PositionSettings(1024, 2, 64, None))
    assert position["windows"] == 2 and 0 < position["bits_per_byte"] < 8
    recall = run_recall(checkpoint, RecallSettings(512, 8, 2, 0))
    assert sum(row["samples"] for row in recall["by_distance"]) == 16
    page = write_report(run).read_text()
    assert "RULER" in page and "Loss by position" in page and "Associative recall" in page
    assert export(checkpoint, run / "hf") == "NsaLmForCausalLM"
