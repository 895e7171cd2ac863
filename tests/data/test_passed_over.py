"""Positions taken out of the stream of training rows: what follows moves up, and nothing else changes."""

from lumina_ds.data.sampler import FILLER_ROW, TrainingOrder


def rows(order, count):
    return [order.row_at(position) for position in range(count)]


def test_what_follows_moves_up():
    whole = rows(TrainingOrder(10, seed=3), 30)
    order = TrainingOrder(10, seed=3)
    assert order.pass_over(4, 2) == whole[4:6]
    assert rows(order, 28) == whole[:4] + whole[6:]
    # Position 8 is now the tenth of the whole stream, so the next window begins there.
    assert order.pass_over(8, 3) == whole[10:13]
    assert order.passed_over == ((4, 2), (10, 3))
    assert rows(order, 25) == whole[:4] + whole[6:10] + whole[13:]
    assert order.epoch_at(8) == 1.3


def test_windows_that_touch_or_span_one_another_become_one():
    order = TrainingOrder(10, seed=3)
    order.pass_over(4, 2)
    order.pass_over(2, 3)  # 2, 3 and, behind the first window, 6
    assert order.passed_over == ((2, 5),)


def test_epochs_end_earlier_and_each_other_row_is_still_seen():
    order = TrainingOrder(7, seed=1, total_rows=14)
    assert order.num_positions == 14
    gone = order.pass_over(3, 2)
    assert order.num_positions == 12
    stream = rows(order, 14)
    assert stream[12:] == [FILLER_ROW] * 2
    assert sorted(stream[:12] + gone) == sorted([*range(7), *range(7)])
    assert TrainingOrder(7, seed=1).num_positions is None
    order.pass_over(10, 4)  # the last two and two fillers
    assert order.num_positions == 10


def test_a_resumed_order_is_given_what_was_passed_over():
    order, resumed = TrainingOrder(10, seed=3), TrainingOrder(10, seed=3)
    order.pass_over(4, 2)
    resumed.passed_over = order.passed_over
    assert rows(resumed, 20) == rows(order, 20)
