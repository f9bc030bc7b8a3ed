"""Any number of runs on one page, each with what it has."""

import json
import shutil

import pytest
import yaml

from eval.charts import power_ticks
from eval.report import load_views, write_comparison, write_report
from tests.eval.conftest import run_script
from tests.eval.test_report import EVIL, Page, run  # noqa: F401


@pytest.fixture
def runs(run, tmp_path_factory):  # noqa: F811
    """One with every evaluation, one with training alone, one with nothing."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("rich", "plain"):
        shutil.copytree(run, folder / name)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"name": name + EVIL}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "plain" / "eval" / "needle")
    (folder / "bare").mkdir()
    (folder / "bare" / "config.yaml").write_text("name: bare\n")
    cells = [
        {"task": task, "length": length, "samples": 5, "score": score}
        for task, score in (("vt", 0.5), ("cwe", 0.25)) for length in (4096, 8192)
    ]  # fmt: skip
    position = {
        f"by_{key}": [{key: 2**i, "tokens": 9, "loss": 4 - i / 9} for i in range(12)]
        for key in ("position", "context")
    }
    by_distance = [
        {"distance": 2**i, "accuracy": i / 9, "selected/layer_00": i / 9, "selected/chance": 0.1}
        for i in range(10)
    ]
    recall = {"by_distance": by_distance}
    for kind, results in (("ruler", {"cells": cells}), ("position", position), ("recall", recall)):
        (folder / "rich" / "eval" / kind).mkdir()
        path = folder / "rich" / "eval" / kind / "step_00000040.json"
        path.write_text(json.dumps(results | {"step": 40}))
        path.with_name("step_00000041.json").write_text('{"samples": []}')  # being measured
    return folder


def test_several_runs(runs):
    html = write_comparison(
        [runs / n for n in ("rich", "plain", "bare")], runs / "c.html"
    ).read_text()
    page = Page(html)
    for text in ("40,000", "2.2000", "520", "NSAAttention", "single: answer generated", "mean over",
                 "37.5", "8,192", "tokens of context", "minutes of training", "distance in tokens",
                 "bare", "–"):  # fmt: skip
        assert text in page.text, text
    assert EVIL not in html and "script" not in {tag for tag, _ in page.tags}
    # Loss twice, bits per byte twice, speed; needle means twice; position twice; recall twice.
    assert [tag for tag, _ in page.tags].count("svg") == 11
    assert 'class="run1"' in html and 'class="run2"' not in html  # the bare run has no curve


def test_a_recipe_has_one_colour_and_what_comes_later_is_dashed(runs):
    rich, plain, bare = (runs / n for n in ("rich", "plain", "bare"))
    views = {"equal tokens": [rich, bare], "equal time": [rich, plain]}
    loaded, groups = load_views([rich, bare, plain], views)
    assert [one.style for one in loaded] == ["run0", "run1", "run1 dashed"]
    assert groups["equal time"] == [loaded[0], loaded[2]]
    page = Page(write_comparison([rich, bare, plain], runs / "c.html", views).read_text())
    assert "dashed: runs of the comparison at equal time" in page.text
    assert ("path", {"class": "run1 dashed"}) in [
        (tag, {"class": dict(attributes).get("class")}) for tag, attributes in page.tags
    ]


def test_a_single_run_shows_them_too(runs):
    page = Page(write_report(runs / "rich").read_text())
    assert "Associative recall" in page.text and "37.5" in page.text and "RULER" in page.text
    assert "RULER" not in Page(write_report(runs / "plain").read_text()).text


def test_power_ticks():
    assert power_ticks(1, 1024) == [1, 4, 16, 64, 256, 1024]
    assert power_ticks(512, 2048) == [512, 1024, 2048]
    for low, high in ((1, 1), (3, 3), (16, 60000), (1, 2**17)):
        ticks = power_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_the_script(runs):
    path = runs / "page, of two.html"
    done = run_script(
        "eval/report.py", f"runs=[{runs / 'rich'},{runs / 'bare'}]", f"comparison_path={path}"
    )
    assert done.returncode == 0 and "Comparison" in path.read_text(), done.stderr
    done = run_script("eval/report.py", f"runs=[{runs / 'rich'},nowhere]")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
