import threading
import time

import pytest

from data.prefetch import prefetch


def test_items_come_in_order_and_ahead_of_time():
    made = []
    items = prefetch((made.append(i) or i for i in range(5)), ahead=2)
    assert next(items) == 0
    time.sleep(0.2)
    assert 3 <= len(made) <= 4  # two wait, and one may stand at the door
    assert list(items) == [1, 2, 3, 4]


def test_an_error_is_raised_where_the_items_are_taken():
    def failing():
        yield 1
        raise ValueError("the disk is gone")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="the disk is gone"):
        next(items)


def test_closing_ends_the_thread():
    before = threading.active_count()
    items = prefetch(iter(int, 1))
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
