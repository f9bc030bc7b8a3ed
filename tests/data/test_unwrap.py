import argparse
import inspect
import json
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.corpus
from data.config import ROOT
from data.prepare import prepare
from data.unwrap import unwrap
from tests.data.test_prepare import BPE, texts

PARAGRAPHS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, and whoever says more about the times has read further than the first page.",
    "A second one, which is long enough to be broken more than once at any width that a person would "
    "choose for a page, and which ends in a line of its own, as the last line of a paragraph does.",
    "Then a short one.",
]


@settings(deadline=None)
@given(
    width=st.integers(50, 90),
    words=st.lists(st.sampled_from("a of was there whoever".split()), min_size=40),
)
def test_wrapped_paragraphs_come_back(width, words):
    # Of many paragraphs, some line comes close to the width they were broken at.
    paragraphs = [*PARAGRAPHS * 4, " ".join(words)]
    wrapped = "\n\n".join(textwrap.fill(paragraph, width) for paragraph in paragraphs)
    assert unwrap(wrapped) == "\n\n".join(paragraphs)


@pytest.mark.parametrize(
    ("end", "start", "joined"),
    [("self-", "made", "self-made"), ("all--", "but", "all--but"), ("house -", "it", "house - it")],
)
def test_a_hyphen_needs_no_space(end, start, joined):
    before = "Of a word at the end of a line and of how it is joined to the one after it, "
    line = before[: 70 - len(end)].rstrip() + " " + end
    wrapped = f"{line}\n{start}, the parts come together.\n\n" + "\n".join([before] * 8)
    assert joined in unwrap(wrapped)


@pytest.mark.parametrize(
    "apart",
    [
        "- an item that is as long as the lines of the text around it are\n" * 2,
        "Roses are red,\nviolets are blue",
        "A heading nearly as long as the lines of the text around it\n" + "=" * 59 + "\nText.",
        "Options that come after a line of words as long as the others are\n-------\nText.",
        "The next heading stands right after a line of the text around it\n## As this one",
        "And so does a block of code, right after a line as long as others\n```python\nx = 1\n```",
        "| a table | of two columns, as long as the lines of the text around |\n|---|---|\n|a|b|",
    ],
)
def test_lists_headings_and_short_lines_stay(apart):
    wrapped = textwrap.fill(" ".join(PARAGRAPHS * 3), 66)
    text = f"{wrapped}\n\n{apart}\n\n{wrapped}"
    assert f"\n\n{apart}\n\n" in unwrap(text) and unwrap(wrapped).count("\n") == 0


def test_prose_with_shorter_lines_is_prose():
    wrapped = textwrap.fill(" ".join(PARAGRAPHS), 66)
    text = "\n\n".join([f"{wrapped}\n- a short item\n- and another\n- and a third"] * 4)
    assert unwrap(text).count("\n") == 4 * 3 + 3 * 2


def test_some_lines_may_be_longer():
    # The width is that of nearly all lines, and a line need not reach it to the last letter.
    wrapped = "\n\n".join([textwrap.fill(" ".join(PARAGRAPHS), 70)] * 20)
    (found,) = set(unwrap(f"{wrapped}\n\n{'x' * 300}").split("\n\n")) - {"x" * 300}
    assert found == " ".join(PARAGRAPHS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "a line\n",
        "Hello world\nGoodbye",
        "The first of two lines that are as long as each other\nand the second of them, which ends here",
        textwrap.fill(" ".join(PARAGRAPHS * 3), 130),
        "\n".join(PARAGRAPHS),
        "Roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you.\n" * 4,
        "\n".join(f"{i},{1000 - i},{i % 7}" for i in range(100, 200)),
        inspect.getsource(argparse),
        inspect.getsource(data.corpus),
        (ROOT / "Makefile").read_text(),
    ],
)
def test_what_was_not_wrapped_stays(text):
    assert unwrap(text) == text


def test_a_novel_comes_back():
    novel = (ROOT / "data" / "austen" / "northanger_abbey.txt").read_text()
    paragraphs = [" ".join(paragraph.split()) for paragraph in novel.split("\n\n")]
    wrapped = "\n\n".join(textwrap.fill(paragraph, 72) for paragraph in paragraphs)
    found = unwrap(wrapped).split("\n\n")
    assert len(found) == len(paragraphs)
    same = sum(a == b for a, b in zip(found, paragraphs, strict=True))
    assert same > 0.99 * len(paragraphs)


def test_a_corpus_is_unwrapped_where_its_config_says_so(tmp_path, capsys):
    wrapped = "\n\n".join(textwrap.fill(paragraph, 60) for paragraph in PARAGRAPHS)
    rows = [{"text": f"Text {i}.\n\n{wrapped}\n"} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for on in (False, True):
        config = {
            "name": "mine",
            "path": str(tmp_path / "t.jsonl"),
            "unwrap": on,
            "validation": {"fraction": 0.2},
        }
        folder = prepare(config, BPE, tmp_path / "out")
        for text in texts(folder, "train"):
            assert (PARAGRAPHS[0] in text) == on
