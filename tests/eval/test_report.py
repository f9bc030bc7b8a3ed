"""One file, whatever of the run is there; nothing of the run's text becomes markup."""

import json
import math
from html.parser import HTMLParser

import pytest
import yaml

from eval.accuracy import summarize
from eval.charts import Series, labels, line_chart, log_ticks, smooth, thin, ticks
from eval.report import write_report
from tests.eval.conftest import run_script

EVIL = '<script>alert("&")</script>'
VOID = {"meta", "br", "path", "circle", "img"}


class Page(HTMLParser):
    """Collects text and checks that every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def needle_results():
    samples = [
        {
            "task": "single", "length": length, "depth": depth, "index": i,
            "generation": i == 0, "ranking": i < 3,
            "needles": [f"The {EVIL} is 7."], "question": "Which?", "generated": EVIL,
        }
        for length in (512, 1024) for depth in (0.0, 100.0) for i in range(4)
    ]  # fmt: skip
    return {
        "step": 40, "chance": {"single": 0.125}, "samples": samples,
        "settings": {"values": "numbers", "candidates": 8, "max_new_tokens": 16},
        "by_length": summarize(samples, "task", "length"),
        "cells": summarize(samples, "task", "length", "depth"),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run's folder with everything but weights."""
    config = {
        "name": EVIL, "data_path": "nowhere", "train": {"seq_len": 1024},
        "attention": {"_target_": "model.attention.nsa.NSAAttention"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, 41):
        lines.append({
            "step": step, "tokens": step * 1000, "time": step * 2.0, "loss": 9 / step, "lr": 1e-3,
            "grad_norm": math.nan if step == 3 else 1.0 / step, "tokens_per_s": 500.0 + step,
        })  # fmt: skip
        if step % 20 == 0:
            lines.append(
                {"step": step, "tokens": step * 1000, "time": 0, "val/loss": 2, "val/bpb": 2.2}
            )
            scores = {f"needle/multi_key/512/{s}": 0.5 for s in ("generation", "ranking")}
            lines.append({"step": step, "tokens": step * 1000, "time": 0, **scores})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "environment.json").write_text(json.dumps({"python": "3.11", "commit": EVIL}))
    side = {"documents": 3, "tokens": 5000, "share": {"8192": 1.0}}
    (tmp_path / "data_summary.json").write_text(
        json.dumps(
            {"name": "austen", "train": side, "validation": side, "tokenizer": {"vocab_size": 512}}
        )
    )
    (tmp_path / "eval" / "needle").mkdir(parents=True)
    (tmp_path / "eval" / "needle" / "step_00000040.json").write_text(json.dumps(needle_results()))
    (tmp_path / "eval" / "baseline.json").write_text(
        json.dumps({"bits_per_byte": 2.75, "data_path": "nowhere"})
    )
    return tmp_path


def test_everything_is_on_the_page(run):
    html = write_report(run).read_text()
    page = Page(html)
    for text in ("2.200", "20% below an order-2 model's 2.750", "Needle ranked first", "25% at 512",
                 "chance is 12.5 %", "40,000 tokens", "median of 40 steps", "Gradient norm",
                 "not positive: 1", "vocab size", "seq_len: 1024", "multi-key, 512"):  # fmt: skip
        assert text in page.text, text
    assert [tag for tag, _ in page.tags].count("svg") == 7


def test_it_is_one_file_without_scripts_or_network(run):
    html = write_report(run).read_text()
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any({"src", "href", "onload"} & attrs.keys() for _, attrs in page.tags)
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert EVIL in page.text and EVIL not in html


@pytest.mark.parametrize("missing", ["metrics.jsonl", "environment.json", "data_summary.json",
                                     "eval/baseline.json", "eval/needle/step_00000040.json"])  # fmt: skip
def test_what_is_missing_is_left_out(run, missing):
    (run / missing).unlink()
    page = Page(write_report(run).read_text())
    sentence = {
        "metrics.jsonl": "No step has been recorded yet.",
        "environment.json": "has no environment.json",
        "data_summary.json": "has no data_summary.json",
        "eval/baseline.json": "No order-2 model beside it",
        "eval/needle/step_00000040.json": f"Not measured yet: python eval/needle.py checkpoint={run}",
    }[missing]
    assert sentence in page.text


def test_a_bare_run(tmp_path):
    (tmp_path / "config.yaml").write_text("name: bare\n")
    assert "bare" in Page(write_report(tmp_path).read_text()).text


def test_a_line_still_being_written_is_left_and_a_broken_one_is_named(run):
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 41, "tok')
    assert "step 40" in Page(write_report(run).read_text()).text
    metrics.write_text(whole + '{"step": 41, "tok\n')
    with pytest.raises(ValueError, match="line 45, is not JSON"):
        write_report(run)


def test_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.yaml"):
        write_report(tmp_path / "nothing")


def test_thinning_keeps_spikes_and_smoothing_keeps_the_level():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7777] = (7777.0, 50.0)
    points[1234] = (1234.0, -50.0)
    kept = thin(points)
    assert len(kept) <= 610 and {points[7777], points[1234]} <= set(kept) and kept == sorted(kept)
    assert smooth(points[:1000]) == points[:1000]
    assert smooth([(0.0, math.nan), (1.0, 2.0)]) == [(1.0, 2.0)]


def test_ticks_are_round_and_cover():
    assert ticks(0, 14.7e6) == [0, 5e6, 10e6, 15e6]
    assert ticks(1.83, 2.75)[0] <= 1.83 and ticks(1.83, 2.75)[-1] >= 2.75
    for low, high in ((0, 0), (3, 3), (-2, -2), (1e-9, 2e-9), (0, 3e-3)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    for low, high in ((0.3, 12), (5, 5), (1e-6, 1e6), (1, 1)):
        found = log_ticks(low, high)
        assert found[0] <= low * 1.001 and found[-1] >= high * 0.999 and len(found) >= 2


def test_labels_differ_as_their_ticks_do():
    assert labels([6.996, 6.9962, 6.9964]) == ["6.996", "6.9962", "6.9964"]
    assert labels([0, 500, 1000, 1250]) == ["0", "500", "1k", "1.25k"]
    assert labels([1.0]) == ["1"]


def test_charts_of_little_or_nothing():
    assert line_chart("t", [Series("a", []), Series("b", [(1, math.nan)])]) == ""
    assert line_chart("t", [Series("a", [(5, 0.0)])], log=True) == ""
    for log in (False, True):
        Page(line_chart("t", [Series("a", [(5.0, 2.0)])], log))


def test_the_script(run):
    done = run_script("eval/report.py", f"run={run}")
    assert done.returncode == 0 and str(run / "report.html") in done.stdout, done.stderr
    done = run_script("eval/report.py", "run=nowhere")
    assert done.returncode == 1
    assert "nowhere is not the folder of a run" in done.stderr and done.stderr.count("\n") == 1
