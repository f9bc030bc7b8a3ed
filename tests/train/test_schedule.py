import pytest

from train.schedule import Schedule


def test_wsd_warms_up_stays_and_decays():
    wsd = Schedule("wsd", warmup=0.1, decay=0.2, final_fraction=0.0)
    scales = [wsd.scale(1000 * p, 1000) for p in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert scales == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


def test_shares_and_numbers_of_tokens_are_the_same():
    shares, tokens = Schedule("wsd", 0.1, 0.0, 0.2), Schedule("wsd", 100, 0.0, 200)
    for at in range(0, 1001, 50):
        assert shares.scale(at, 1000) == pytest.approx(tokens.scale(at, 1000))


def test_a_longer_run_keeps_a_warm_up_in_tokens():
    schedule = Schedule("wsd", 100, 0.0, 200)
    assert schedule.scale(50, 1000) == schedule.scale(50, 5000) == 0.5


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_is_monotone_to_the_final_fraction(kind):
    schedule = Schedule(kind, warmup=0.1, final_fraction=0.1)
    scales = [schedule.scale(i, 100) for i in range(10, 101)]
    assert scales[0] == 1 and scales[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(scales, scales[1:], strict=False))
    assert scales[45] == pytest.approx(0.55)


@pytest.mark.parametrize("values, name", [((-1, 0.0), "warmup"), ((0.1, 2.0), "final_fraction")])
def test_a_value_out_of_range_is_an_error(values, name):
    with pytest.raises(ValueError, match=name):
        Schedule("wsd", *values)
