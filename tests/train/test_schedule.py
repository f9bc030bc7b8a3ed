import pytest

from train.schedule import Schedule


def test_wsd_warms_up_stays_and_decays():
    wsd = Schedule("wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.0)
    scales = [wsd.scale(p) for p in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert scales == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_is_monotone_to_the_final_fraction(kind):
    schedule = Schedule(kind, warmup_fraction=0.1, final_fraction=0.1)
    scales = [schedule.scale(i / 100) for i in range(10, 101)]
    assert scales[0] == 1 and scales[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(scales, scales[1:], strict=False))
    assert scales[45] == pytest.approx(0.55)


def test_a_share_beyond_one_is_an_error():
    with pytest.raises(ValueError, match="warmup_fraction"):
        Schedule("wsd", 2.0, 0.0)
