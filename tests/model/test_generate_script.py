"""scripts/generate.py as a person would use it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.tokenizer import train_tokenizer
from model.build import build_decoder
from model.checkpoint import save_weights
from scripts.generate import speed
from tests.model.test_decoder import ATTENTIONS, MODEL

ROOT = Path(__file__).resolve().parents[2]
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000001"
    tokenizer = train_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    model = build_decoder(MODEL, ATTENTIONS["nsa"], tokenizer.get_vocab_size())
    config = dict(model=MODEL, attention=ATTENTIONS["nsa"])
    save_weights(folder, dict(model.state_dict()), config, tokenizer)
    return folder.parents[1]


def run(checkpoint, *arguments, typed=""):
    command = [sys.executable, "scripts/generate.py", f"checkpoint={checkpoint}", "device=cpu"]
    return subprocess.run(
        [*command, "max_new_tokens=8", *arguments],
        cwd=ROOT, capture_output=True, text=True, input=typed,
    )  # fmt: skip


def test_a_prompt_is_continued_and_the_speed_is_told(checkpoint, tmp_path):
    done = run(checkpoint, "prompt=It is")
    assert done.returncode == 0 and done.stdout.startswith("It is") and len(done.stdout) > 7
    assert "tokens/s" in done.stderr
    file = tmp_path / "it is.txt"
    file.write_text("It is")
    assert "It is" + run(checkpoint, f"prompt_file={file}").stdout == done.stdout


def test_chat_continues_the_text_so_far(checkpoint):
    done = run(checkpoint, "chat=true", "temperature=0", typed="It is\na wife\n")
    assert done.returncode == 0 and done.stdout.count("> ") == 3
    first, second = (int(line.split()[0]) for line in done.stderr.splitlines())
    assert second > first + 8


@pytest.mark.parametrize(
    "argument, message",
    [
        ("top_p=0", "0 < top_p <= 1"),
        ("max_new_tokens=0", "at least 1"),
        ("prompt_file=nowhere.txt", "no such file"),
        ("prompts=x", "did you mean prompt?"),
    ],
)
def test_a_wrong_argument_is_one_sentence(checkpoint, argument, message):
    done = run(checkpoint, argument)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_rates_leave_out_what_happens_once():
    # A prompt, two steps that compile and capture, two more.
    clock = [0.0, 2.0, 5.0, 9.0, 9.5, 10.0]
    told = speed(1000, clock, compiles=False)
    assert told == (
        "1,000 prompt tokens in 2.00 s (500 tokens/s), then 4 in 8.00 s (the last 2 at 2 tokens/s)"
    )
    assert "(500 tokens/s)" not in speed(1000, clock, compiles=True)
    assert speed(7, clock[:2], compiles=True).endswith("compilation of kernels included")
