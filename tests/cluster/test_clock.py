"""The offset of another host's clock, from literal times."""

from __future__ import annotations

from launcher.cluster.clock import UNKNOWN_NS, WINDOW, ClockEstimate


def test_nothing_is_known_before_the_first_sample() -> None:
    clock = ClockEstimate()
    assert (clock.offset_ns, clock.uncertainty_ns) == (0, UNKNOWN_NS)


def test_offset_and_uncertainty() -> None:
    clock = ClockEstimate()
    clock.add(1_000, 5_000_001_100, 1_200)
    assert (clock.offset_ns, clock.uncertainty_ns) == (5_000_000_000, 100)


def test_the_shortest_round_trip_counts() -> None:
    clock = ClockEstimate()
    clock.add(1_000, -8_500, 2_000)  # symmetric: -10,000
    clock.add(3_000, -6_990, 3_021)  # round trip 21
    clock.add(4_000, -1_000, 9_000)
    assert (clock.offset_ns, clock.uncertainty_ns) == (-10_000, 11)


def test_an_asymmetric_path_stays_within_the_uncertainty() -> None:
    clock = ClockEstimate()
    clock.add(0, 700 + 50, 100)  # true offset 700, all of the delay on one way: 50 is off by half of the trip
    assert abs(clock.offset_ns - 700) <= clock.uncertainty_ns == 50


def test_drift_is_followed() -> None:
    clock = ClockEstimate()
    clock.add(0, 1_000, 2)  # by far the best one, but it gets old
    for number in range(1, WINDOW + 1):
        assert clock.uncertainty_ns == 1
        clock.add(number * 100, number * 100 + 5_000 + 10 * number + 5, number * 100 + 10)
    # of equal round trips the newest
    assert (clock.offset_ns, clock.uncertainty_ns) == (5_000 + 10 * WINDOW, 5)


def test_an_answer_before_its_question_is_no_sample() -> None:
    clock = ClockEstimate()
    clock.add(1_000, 5_000, 999)
    assert clock.uncertainty_ns == UNKNOWN_NS
