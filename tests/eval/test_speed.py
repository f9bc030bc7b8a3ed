"""The attention benchmark without a GPU: its selections, its tables and its figure."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from eval import speed
from eval.speed import save_figure, save_growth, tables
from scripts.bench_attention import GEOMETRY, shared_part, synthetic_selection


@pytest.mark.parametrize("share", [0.95, 0.85, 0.0])
def test_selections_are_legal_and_share_what_was_asked(share):
    tokens = 8192
    indices = synthetic_selection(tokens, 2, share, device="cpu")
    assert indices.shape == (2, tokens, GEOMETRY.num_selected)
    own = torch.arange(tokens) // GEOMETRY.select_block
    last = indices.amax(-1)
    assert torch.equal(last, own.int().expand(2, -1))  # the own block, and none of the future
    assert (indices[:, :, 0] == 0).all()
    padded = torch.where(indices < 0, tokens, indices)
    assert (padded.diff(dim=-1) >= 0).all()
    assert ((padded.diff(dim=-1) > 0) | (padded[..., 1:] == tokens)).all()
    # A block drawn anew is the old one by chance, often while the past is short.
    assert share - 0.05 < shared_part(indices) < share + (1 - share) * 0.35


def test_tables_and_figure(tmp_path):
    whole = [
        dict(shape="c", tokens=n, what=what, direction=way, ms=ms * n / 8192, memory_gb=1.0)
        for n in (8192, 65536)
        for what, ms in (("cudnn", 6.0), ("flash", 9.0), ("nsa 85 %", 2.0))
        for way in ("forward", "backward")
    ]
    for way in ("forward", "backward"):
        graph = dict(shape="c", tokens=8192, what="nsa 85 %, CUDA graph", direction=way, ms=12.0)
        whole.append(graph)
    part = dict(shape="c", tokens=8192, what="nsa 85 %", part="gate", direction="forward")
    step = dict(shape="c", tokens=8192, batch=1)
    results = dict(
        device="a card", torch="2", triton="3", date="today", commit="0", command="run", whole=whole,
        parts=[part | dict(ms=1.0, floor_share=0.5)],
        decode=[step | dict(what="nsa", ms=0.01), step | dict(what="flash", ms=0.05)],
    )  # fmt: skip
    text = tables(results)
    row = "48.00 / 48.00 | 72.00 / 72.00 | 16.00 / 16.00 (3.0 / 3.0) |  | 1.0 |"
    assert f"| c 16/4/128 | 65,536 | {row}" in text
    assert "| c 16/4/128 | nsa 85 % | 3.00 | 3.00 | 8,192 |" in text
    assert "| c 16/4/128 | nsa 85 %, CUDA graph | 0.50 |  |  |" in text
    assert "| c 16/4/128 | 1 | 8,192 | 10.0 | 50.0 | 5.0 |" in text
    save_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_growth_is_drawn_where_there_are_several_lengths(tmp_path, monkeypatch):
    kept = []

    class Kept(Figure):
        def savefig(self, *args, **options):
            kept.append(self)
            super().savefig(*args, **options)

    monkeypatch.setattr(speed, "Figure", Kept)
    variants = {
        f"nsa at {n}k": {"tokens_per_s": 1e5 / n**0.2, "forward_s": n / 300} for n in (128, 32, 64)
    }
    variants |= {"full at 64k": {"tokens_per_s": 3e4}, "nsa at 256k": {"error": "out of memory"}}
    save_growth(variants, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
    (panel,) = kept[0].axes
    step, forward = panel.lines
    assert (step.get_label(), forward.get_label()) == ("nsa, step", "nsa, forward")
    assert list(step.get_xdata()) == [32 << 10, 64 << 10, 128 << 10]
    assert np.allclose(step.get_ydata(), [n * 1024 * n**0.2 / 1e5 for n in (32, 64, 128)])
    assert np.allclose(forward.get_ydata(), [n / 300 for n in (32, 64, 128)])
    assert [text.get_text() for text in panel.texts] == ["2.30", "2.30", "2.00", "2.00"]
    save_growth({"full at 64k": {"tokens_per_s": 3e4}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
