"""The cost model is exact where time is a sum over layers, monotone under noise, and can carry vLLM's cache groups."""

from collections import Counter

import numpy as np
import pytest

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.hybrid.layout import counts
from dtr_deploy.throughput.cost_model import CostModel, CurvePoint, layout_of_counts

LAYERS = 30
BASE = Throughput("fake", "fp32", Workload(4096, 512), 3, 6.0, 4.0, 10.0)
SAVED = {"gla": (0.02, 0.015), "gated_deltanet": (0.025, 0.01)}  # of (prefill, decode), each layer


def additive(layout):
    return tuple(1 - sum(SAVED[form][part] * n for form, n in counts(layout).items()) for part in (0, 1))


def point(layout, times=additive):
    return CurvePoint(layout, *times(layout))


def only(form, n):
    return layout_of_counts(LAYERS, {form: n})


def test_exact_for_sums_over_layers_mixtures_included():
    model = CostModel.fit(BASE, [point(only("gla", 29)), point(only("gated_deltanet", 29))])
    for mixed in ({"gla": 7}, {"gla": 3, "gated_deltanet": 20}, {"gated_deltanet": 29}, {}):
        layout = layout_of_counts(LAYERS, mixed)
        prefill, decode = additive(layout)
        assert model.predict(layout) == pytest.approx((prefill, decode))
        assert model.speedup(layout) == pytest.approx(10.0 / (6.0 * prefill + 4.0 * decode))


def test_interpolates_between_points_and_extends_the_last_segment():
    points = [CurvePoint(only("gla", 10), 0.9, 1.0), CurvePoint(only("gla", 20), 0.6, 0.8)]
    model = CostModel.fit(BASE, points)
    assert model.predict(only("gla", 5)) == pytest.approx((0.95, 1.0))
    assert model.predict(only("gla", 15)) == pytest.approx((0.75, 0.9))
    assert model.predict(only("gla", 25)) == pytest.approx((0.45, 0.7))


@pytest.mark.parametrize("slope", [-0.02, 0.02])
def test_monotone_under_noise_in_either_direction(slope):
    rng = np.random.default_rng(0)
    points = [CurvePoint(only("gla", n), *(1 + slope * n + rng.normal(0, 0.05, 2))) for n in range(2, 30, 3)]
    model = CostModel.fit(BASE, points)
    for part in (0, 1):
        steps = np.diff([model.predict(only("gla", n))[part] for n in range(30)])
        assert (steps * np.sign(slope) >= -1e-12).all()


def test_repeated_points_count_by_their_median():
    model = CostModel.fit(BASE, [CurvePoint(only("gla", 10), ratio, 1.0) for ratio in (0.8, 0.9, 5.0)])
    assert model.predict(only("gla", 10))[0] == pytest.approx(0.9)


def test_cache_groups_are_told_apart_from_layers():
    def groups(layout):  # as vLLM makes them: of the size of the smaller kind
        kinds = Counter(form is None for form in layout)
        size = min(kinds.values()) if len(kinds) > 1 else len(layout)
        return sum(-(-n // size) for n in kinds.values())

    def times(layout):
        prefill, decode = additive(layout)
        return prefill + 0.001 * (groups(layout) - 1), decode + 0.01 * (groups(layout) - 1)

    model = CostModel.fit(BASE, [point(only("gla", n), times) for n in (8, 15, 22, 29)], groups)
    assert model.group_cost == pytest.approx((0.001, 0.01))
    for n in (2, 12, 20, 28):
        assert model.predict(only("gla", n)) == pytest.approx(times(only("gla", n)))
    # 28 + 2 makes 15 groups: the first replacements are slower than the backbone, and the model knows.
    assert model.speedup(only("gla", 2)) < 1 < model.speedup(only("gla", 15))


def test_groups_that_cannot_be_told_apart_cost_nothing():
    model = CostModel.fit(BASE, [point(only("gla", 29))], groups=lambda layout: 1 + len(layout) - layout.count(None))
    assert model.group_cost == (0.0, 0.0)
    assert model.predict(only("gla", 29)) == pytest.approx(additive(only("gla", 29)))


def test_padded_layers_are_told_apart_from_layers():
    """Mixtures cost 0.004 a layer more than the sum, for each layer whose state is not the largest."""

    def padded(layout):
        return layout.count("gla") if "gated_deltanet" in layout else 0

    def times(layout):
        prefill, decode = additive(layout)
        return prefill, decode + 0.004 * padded(layout)

    mixed = layout_of_counts(LAYERS, {"gla": 14, "gated_deltanet": 14})
    points = [point(layout, times) for layout in (only("gla", 29), only("gated_deltanet", 29), mixed)]
    model = CostModel.fit(BASE, points, padded=padded)
    assert model.padded_cost == pytest.approx((0.0, 0.004))
    other = layout_of_counts(LAYERS, {"gla": 5, "gated_deltanet": 9})
    assert model.predict(other) == pytest.approx(times(other))
    assert model.predict(only("gla", 12)) == pytest.approx(times(only("gla", 12)))
    # A mixture that is faster than the sum says nothing about padding.
    assert CostModel.fit(BASE, [*points[:2], CurvePoint(mixed, 0.3, 0.3)], padded=padded).padded_cost == (0.0, 0.0)


def test_stand_ins_have_the_counts_and_are_spread():
    for wanted in ({"gla": 1}, {"gla": 10, "gated_deltanet": 5}, {"gla": 30}, {}):
        assert counts(layout_of_counts(LAYERS, wanted)) == dict(sorted(wanted.items()))
    assert [i for i, form in enumerate(layout_of_counts(LAYERS, {"gla": 3})) if form] == [5, 15, 25]
    both = [form for form in layout_of_counts(LAYERS, {"gla": 10, "gated_deltanet": 10}) if form]
    assert both[:4].count("gla") == 2
    with pytest.raises(ValueError, match="31 layers"):
        layout_of_counts(LAYERS, {"gla": 31})


def test_a_form_that_was_not_measured_is_an_error():
    model = CostModel.fit(BASE, [point(only("gla", 29))])
    with pytest.raises(KeyError):
        model.predict(only("gated_deltanet", 3))
    with pytest.raises(ValueError, match="at least one"):
        CostModel.fit(BASE, [])
