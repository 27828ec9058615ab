"""tools/benchmark/stats.py: intervals hold what they promise on simulated noise, and times are counted from `at`."""

import math
from collections.abc import Callable
from random import Random

import pytest

from lite_llm.errors import UsageError
from tools.benchmark import stats
from tools.benchmark.stats import median_and_interval, percentiles, ratio_of
from tools.benchmark.work import Answer, Ask, Run, Work

WORK = Work("three", (Ask((1,), 3, 0.0), Ask((1,), 1, 1.0), Ask((1,), 2, 2.0)))
ANSWERS = (
    Answer((7, 7, 7), 0.25, (0.5, 0.75, 1.5), 1.5),
    Answer((7,), 1.5, (3.0,), 3.0),
    Answer((7, 7), 2.0, (2.5, 4.0), 4.0),
)
RUN = Run(4.0, ANSWERS, 0, None, {})
ENDS = Run(4.0, tuple(Answer(a.tokens, a.sent, (), a.ended) for a in ANSWERS), 0, None, {})


def quiet(rng: Random) -> float:
    return rng.gauss(1.0, 0.01)


def hiccups(rng: Random) -> float:
    """1 % of noise to one side, and one run of ten takes a quarter longer."""
    return 1 + rng.expovariate(100) + 0.25 * (rng.random() < 0.1)


def differing(runs: int, noise: Callable[[Random], float], shift: float, trials: int = 400) -> float:
    """The share of trials in which interleaved runs A B A B of the same noise, B's times `shift`, are told apart."""
    rng, found = Random(runs), 0
    for _ in range(trials):
        pairs = [(noise(rng), noise(rng) * shift) for _ in range(runs)]
        found += ratio_of(*zip(*pairs)).differs
    return found / trials


@pytest.mark.parametrize("noise", [quiet, hiccups])
@pytest.mark.parametrize("runs", [6, 9, 12, 20])
def test_a_side_does_not_differ_from_itself(runs, noise):
    assert 0.005 <= differing(runs, noise, 1.0) <= 0.07


@pytest.mark.parametrize("runs", [2, 3, 4, 5])
def test_nor_with_few_runs_and_normal_noise(runs):
    assert 0.02 <= differing(runs, quiet, 1.0) <= 0.08


@pytest.mark.parametrize(
    "runs, noise, found", [(4, quiet, 0.95), (5, quiet, 0.99), (6, quiet, 0.99), (12, quiet, 1.0), (20, hiccups, 0.95)]
)
def test_a_shift_of_5_percent_is_found(runs, noise, found):
    assert differing(runs, noise, 1.05) >= found
    assert differing(runs, noise, 0.95) >= found


def test_a_ratio_is_the_median_of_the_pairs_whatever_drifts_from_pair_to_pair():
    a, b = [2.0, 4.2, 8.0, 16.0, 32.0, 66.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert ratio_of(a, b) == stats.Ratio(2.0, 2.0, 2.1, True)
    assert ratio_of(a, a) == stats.Ratio(1.0, 1.0, 1.0, False)


def test_of_a_single_pair_nobody_knows_whether_it_differs():
    assert ratio_of([2.0], [1.0]) == stats.Ratio(2.0, 2.0, 2.0, None)


@pytest.mark.parametrize(
    "n, low, high", [(6, 1, 6), (8, 1, 8), (9, 2, 8), (11, 2, 10), (12, 3, 10), (15, 4, 12), (20, 6, 15), (25, 8, 18),
                     (50, 18, 33), (100, 40, 61)]
)  # fmt: skip
def test_intervals_are_the_order_statistics_of_the_tables(n, low, high):
    values = list(range(1, n + 1))
    Random(n).shuffle(values)
    assert median_and_interval(values) == ((n + 1) / 2, low, high)
    lost = sum(math.comb(n, i) for i in range(low)) / 2**n  # at one end: low is as far in as 2.5 % allow
    assert lost <= 0.025 < lost + math.comb(n, low) / 2**n


def test_few_values_have_wide_intervals_and_one_has_none():
    assert median_and_interval([3.0]) == (3.0, 3.0, 3.0)
    median, low, high = median_and_interval([3.0, 1.0, 2.0])  # their standard deviation is 1
    assert median == 2.0 and (low, high) == pytest.approx((2 - 2.55, 2 + 2.55))
    assert median_and_interval([2.0] * 4) == (2.0, 2.0, 2.0)


def test_percentiles_by_hand():
    assert percentiles([40.0, 10.0, 30.0, 20.0]) == pytest.approx((25.0, 37.0, 39.7))
    assert percentiles(range(101), (99, 0, 50, 12.5, 100)) == (99, 0, 50, 12.5, 100)
    assert percentiles([7.0], (1, 50, 99)) == (7.0, 7.0, 7.0)


def test_times_of_requests_count_from_when_they_were_due():
    assert stats.first_token(RUN, WORK) == (0.5, 2.0, 0.5)
    assert stats.end_to_end(RUN, WORK) == (1.5, 2.0, 2.0)
    assert stats.per_token(RUN) == (0.5, 1.5)  # a single token has no time between tokens


def test_tokens_per_second_counts_what_was_made():
    assert stats.tokens_per_second(RUN) == 6 / 4.0


def test_goodput_counts_requests_within_both_limits():
    assert stats.goodput(RUN, WORK) == 3 / 4.0
    assert stats.goodput(RUN, WORK, ttft=0.5) == 2 / 4.0
    assert stats.goodput(RUN, WORK, tpot=0.5) == 2 / 4.0
    assert stats.goodput(RUN, WORK, ttft=0.5, tpot=0.5) == 1 / 4.0
    assert stats.goodput(RUN, WORK, ttft=0.49) == 0.0


def test_a_side_that_tells_only_the_end_has_no_times_of_tokens():
    assert stats.first_token(ENDS, WORK) == stats.per_token(ENDS) == ()
    assert stats.end_to_end(ENDS, WORK) == (1.5, 2.0, 2.0)
    assert stats.tokens_per_second(ENDS) == 1.5 and stats.goodput(ENDS, WORK) == 0.75
    with pytest.raises(UsageError, match="tells no times"):
        stats.goodput(ENDS, WORK, ttft=1.0)


def test_answers_of_another_work_are_not_counted():
    short = Run(RUN.seconds, ANSWERS[:2], 0, None, {})
    for figure in (stats.first_token, stats.end_to_end, stats.goodput):
        with pytest.raises(ValueError, match="zip"):
            figure(short, WORK)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: median_and_interval([]), ValueError, "at least one"),
        (lambda: median_and_interval([1.0, math.nan]), ValueError, "finite"),
        (lambda: percentiles([]), ValueError, "at least one"),
        (lambda: percentiles([1.0], (101,)), ValueError, "from 0 to 100"),
        (lambda: ratio_of([1.0, 2.0], [1.0]), ValueError, "2 runs and b 1"),
        (lambda: ratio_of([1.0], [0.0]), ValueError, "above 0"),
        (lambda: stats.goodput(RUN, WORK, ttft=0), UsageError, "ttft = 0; expected more than 0"),
        (lambda: stats.goodput(RUN, WORK, tpot=math.nan), UsageError, "tpot = nan; expected more than 0"),
    ],
)
def test_bad_arguments_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
