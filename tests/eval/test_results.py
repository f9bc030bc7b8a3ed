"""Markdown and figures of a comparison."""

import json
import shutil
from types import SimpleNamespace

from eval.compare import clock, overview_rows, size_note
from eval.heatmap import save_heatmaps
from eval.report import write_comparison
from eval.results import write_results
from tests.eval.test_compare import run, runs  # noqa: F401


def test_tables_and_figures(runs):  # noqa: F811
    folders = [runs / name for name in ("rich", "plain", "bare")]
    path = write_results({"equal tokens": folders, "equal time": folders[:1]}, runs, "the command")
    text = path.read_text()
    for words in ("## Loss at equal time", "    the command", "| +0.0000 |", "| bare", "37.5",
                  "## Associative recall", "| position (tokens) |", "| 25.0 |",
                  "(10.0) |"):  # fmt: skip
        assert words in text, words
    for name in ("loss", "position", "needle_equal_tokens", "needle_equal_time"):
        assert f"(figures/{name}.png)" in text
        assert (runs / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_measured_on_different_tasks(runs):  # noqa: F811
    """As in a comparison whose evaluations were changed, until all runs have the new ones."""
    shutil.copytree(runs / "rich" / "eval" / "needle", runs / "plain" / "eval" / "needle")
    (path,) = (runs / "plain" / "eval" / "needle").glob("*.json")
    results = json.loads(path.read_text())
    for rows in (results["by_length"], results["cells"]):
        rows += [row | {"task": "multi_key", "length": 7777} for row in rows]
    path.write_text(json.dumps(results | {"chance": {"single": 0.25, "multi_key": 0.25}}))
    for order in (["rich", "plain"], ["plain", "rich"]):
        views = {"equal tokens": [runs / name for name in order]}
        text = write_results(views, runs, "the command").read_text()
        assert "| multi-key | generated | –" in text
        assert "multi-key" in write_comparison(views["equal tokens"], runs / "c.html").read_text()


def test_a_large_heatmap_is_small_enough_to_keep(tmp_path):
    cells = [
        {"task": "single", "length": 4096 << i, "depth": 10.0 * d, "samples": 8,
         "generation": (3 * i + d) % 8 / 8, "ranking": (i + d) % 8 / 8}
        for i in range(5) for d in range(11)
    ]  # fmt: skip
    results = {"cells": cells, "chance": {"single": 0.125}}
    save_heatmaps({f"{name}_small_64k_same_time": results for name in "abc"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 150_000


def test_the_clock_counts_a_step_that_compiles_like_any_other_and_a_slow_one_in_full():
    speeds = [1.0, 10, 10, 10, 2, 20, 20]
    steps = [
        {"tokens": 10 * (i + 1), "tokens_per_s": speed, "seq_len": 64 if i < 4 else 32}
        for i, speed in enumerate(speeds)
    ]
    assert clock(steps) == [1, 2, 3, 4, 4.5, 5, 5.5]
    larger = {"tokens": 110, "tokens_per_s": 40, "seq_len": 32}  # a step of 40 tokens
    assert clock([*steps, larger]) == [1, 2, 3, 4, 4.5, 5, 5.5, 6.5]
    longer_documents = {"tokens": 50, "tokens_per_s": 4, "seq_len": 64}
    assert clock([*steps[:4], longer_documents]) == [1, 2, 3, 4, 6.5]


def test_mfu_is_of_all_the_time_or_not_given():
    steps = [
        {"tokens": 10, "tokens_per_s": 10, "mfu": 0.6},
        {"tokens": 50, "tokens_per_s": 40 / 3, "mfu": 0.2},  # three times as long
    ]
    uneven = SimpleNamespace(
        name="a", training=steps, validation=[], config={}, num_parameters=None
    )
    assert overview_rows([uneven])[1][7] == "30.0%"
    del steps[0]["mfu"]
    assert overview_rows([uneven])[1][7] == "–"


def test_models_of_unequal_size_are_said():
    sizes = dict(a=100, b=101, c=None)
    a, b, c = (SimpleNamespace(name=n, num_parameters=p) for n, p in sizes.items())
    assert not size_note([a, b, c]) and not size_note([c])
    b.num_parameters = 130
    assert "a has 100 parameters, b 130" in size_note([a, b, c])
