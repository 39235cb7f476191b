"""The cost curve: read, measured at a bad moment, and corrected by the steps that follow."""

from __future__ import annotations

import pytest
from stretto.decoding import cost
from stretto.decoding.cost import CostCurve, CostMeter
from stretto.decoding.width import DepthAcceptance, best_width

TRUE = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6, 16: 3.0}


def test_between_points_and_beyond():
    curve = CostCurve((1, 2, 4), (1.0, 2.0, 3.0))
    assert [curve(n) for n in (1, 2, 3, 4, 6)] == [1.0, 2.0, 2.5, 3.0, 4.0]
    assert curve.relative() == {1: 1.0, 2: 2.0, 4: 3.0}
    assert CostCurve((1,), (1.0,))(5) == 5.0


def test_noise_in_a_narrow_step_does_not_lift_wider_ones():
    meter = CostMeter()
    meter.refresh(lambda rows: 9.0 if rows == 2 else TRUE[rows], 512)
    assert meter.curve == CostCurve((1, 2, 4, 8, 16), (1.0, 1.2, 1.2, 1.6, 3.0))


def test_widths_stop_at_the_limit(monkeypatch: pytest.MonkeyPatch):
    meter = CostMeter()
    meter.refresh(lambda rows: TRUE[rows], 5)
    assert meter.curve is not None
    assert meter.curve.rows == (1, 2, 4)
    monkeypatch.setattr(meter, "_next_probe", 0.0)
    meter.refresh(lambda rows: TRUE[rows], 512)  # the next request has room for more
    assert meter.curve.rows == cost.WIDTHS


def test_a_measurement_taken_at_a_bad_moment_heals(monkeypatch: pytest.MonkeyPatch):
    """Wide steps looked five times dearer. Nobody tries them, so only probes can find out; they take no more than their share of the time."""
    now = 0.0
    monkeypatch.setattr(cost.time, "monotonic", lambda: now)
    meter, probing = CostMeter(), 0.0

    def step(rows: int) -> float:
        nonlocal now, probing
        now += TRUE[rows]
        probing += TRUE[rows]
        return TRUE[rows]

    meter.refresh(lambda rows: TRUE[rows] * (5 if rows > 1 else 1), 512)
    probing = 0.0
    for _ in range(40_000):
        meter.refresh(step, 512)
        now += TRUE[1]
        meter.observe(1, TRUE[1])
    assert meter.curve is not None
    assert meter.curve.relative() == pytest.approx(TRUE, rel=0.05)
    assert probing / now <= cost.PROBE_SHARE


def test_a_longer_context_is_followed_and_an_accident_is_not():
    meter = CostMeter()
    meter.refresh(lambda rows: TRUE[rows], 512)
    meter.observe(4, 100.0)
    assert meter.curve is not None
    assert meter.curve(4) <= 1.11 * TRUE[4]
    for _ in range(100):
        meter.observe(4, 2.0)
    assert meter.curve(4) == pytest.approx(2.0, rel=0.01)


def test_an_assumed_curve_stays():
    meter, curve = CostMeter(), CostCurve((1, 32), (1.0, 4.0))
    meter.assume(curve)
    meter.observe(1, 5.0)
    meter.refresh(lambda rows: 7.0, 512)
    assert meter.curve == curve


def test_a_proposer_that_is_never_right_costs_little():
    """Whatever the curve: either speculation has stopped, or a step costs at most 5 % more than a plain one."""
    acceptance = DepthAcceptance()
    for _ in range(100):
        acceptance.update(0, 4)
    for steepness in (0.01, 0.03, 0.045, 0.06, 0.2):
        curve = CostCurve((1, 2, 4), (1.0, 1 + steepness, 1 + 3 * steepness))
        nodes, _ = best_width([0, 1, 2, 3], acceptance, curve, 0, 0.0)
        assert curve(nodes) <= 1.05
