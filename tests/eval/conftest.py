import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import train_tokenizer
from eval.haystack import Haystack
from eval.needle_samples import TEMPLATES, DuringTraining, NeedleSettings

PLACES = "Bath Clifton Fullerton Northanger Salisbury Bristol Wells Oxford".split()
TEXT = " ".join(
    f'Mr. Tilney went to {PLACES[i % 8]} on day {i}. "Was it {PLACES[i * 5 % 8]}?" asked Mrs. Allen.'
    for i in range(400)
)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT, *(2 * part for forms in TEMPLATES for part in forms)], 512)


@pytest.fixture(scope="session")
def haystack(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return Haystack([np.array(ids)], tokenizer, longest=8192)


@pytest.fixture
def settings():
    return NeedleSettings(
        tasks=["single"], lengths=[320, 512], depths=3, samples=6, needles=3, values="numbers",
        candidates=5, max_new_tokens=16, seed=0, haystack=None,
        during=DuringTraining(None, None, None, None),
    )  # fmt: skip


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    """Run one of our scripts as a person would, from the repository's root."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True)
