"""A calibrated cost predicts where its check holds, measures where not, and needs few measurements."""

from collections import Counter

import pytest

from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.layout import full, replaced
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.throughput.calibrate import calibrate
from dtr_deploy.throughput.cost_model import layout_of_counts
from dtr_deploy.throughput.measure import ThroughputMeter
from tests.throughput.fake import FakeServer

LAYERS = 12
WORKLOAD = Workload(4096, 512, 2)
SAVED = {"gla": 0.2, "gla@0": 0.25, "gated_deltanet@256": 0.05}  # seconds of prefill, each layer


def gla(n: int):
    return layout_of_counts(LAYERS, {"gla": n})


def additive(layout):
    return 4.0 - 0.2 * replaced(layout), 2.0 - 0.05 * replaced(layout)


def by_entry(layout):
    return 4.0 - sum(SAVED[entry] for entry in layout if entry), 2.0 - 0.05 * replaced(layout)


def cache_bytes(layout):
    return 1000 * layout.count(None)


def make_meter(server, workload=WORKLOAD) -> ThroughputMeter:
    return ThroughputMeter(server, workload, Ledger(":memory:"), "inputs")


def test_performance_is_the_backbones_seconds_times_ratios():
    cost = calibrate(make_meter(FakeServer(additive)), LAYERS, {"gla": 12}, cache_bytes)
    prefill, decode = additive(gla(5))
    for found in (cost.predicted(gla(5)), cost.performance(gla(5))):
        assert found.speedup == pytest.approx(6.0 / (prefill + decode))
        assert found.first_token_seconds == pytest.approx(prefill)
        assert found.token_seconds == pytest.approx(decode / 511)  # 512 tokens, the first of them after prefill
        assert found.cache_bytes == 7000
    assert cost.performance(full(LAYERS)).to_dict() == pytest.approx(
        {"speedup": 1.0, "first_token_seconds": 4.0, "token_seconds": 2.0 / 511, "cache_bytes": 12000}
    )


def test_an_untrusted_model_still_looks_ahead_but_measures_to_decide():
    def seconds(layout):
        return (4.0 if replaced(layout) % 3 else 6.0), 2.0

    server = FakeServer(seconds)
    cost = calibrate(make_meter(server), LAYERS, {"gla": 12}, cache_bytes)
    opened = len(server.opened)
    cost.predicted(gla(4))
    assert len(server.opened) == opened
    base = cost.model.base.prefill_seconds
    assert base == 6.0  # none replaced counts as a multiple of three
    assert cost.performance(gla(4)).first_token_seconds == pytest.approx(4.0)
    assert len(server.opened) > opened


def test_a_workload_of_one_token_has_no_time_per_token():
    server = FakeServer(lambda layout: (additive(layout)[0], 0.0))
    cost = calibrate(make_meter(server, Workload(100, 1)), LAYERS, {"gla": 12}, cache_bytes)
    assert cost.performance(gla(5)).token_seconds == 0.0


@pytest.mark.parametrize(("with_groups", "measured"), [(False, 4), (True, 6)])
def test_each_further_entry_costs_one_measurement(with_groups, measured):
    """Three entries: one layout each and a mixture; with cache groups two more of the first."""

    def groups(layout):  # as vLLM makes them: of the size of the smaller kind
        kinds = Counter(entry is None for entry in layout)
        size = min(kinds.values())
        return sum(-(-n // size) for n in kinds.values())

    def seconds(layout):
        prefill, decode = by_entry(layout)
        return prefill, decode + (0.02 * groups(layout) if with_groups else 0)

    server = FakeServer(seconds)
    counter = groups if with_groups else None
    cost = calibrate(make_meter(server), LAYERS, dict.fromkeys(SAVED, 11), cache_bytes, groups=counter)
    assert len(server.opened) == measured + 1  # and the backbone, once
    assert cost.trusted and cost.largest_relative_error < 1e-6
    mixed = ("gla", None, "gla@0", None, "gated_deltanet@256", "gla@0", None, None, None, None, None, None)
    assert cost.predicted(mixed).first_token_seconds == pytest.approx(seconds(mixed)[0])
    assert cost.predicted(mixed).token_seconds == pytest.approx(seconds(mixed)[1] / 511)


def test_states_of_different_sizes_cost_one_more_mixture():
    def padded(layout):
        return float(layout.count("gla@0")) if "gla" in layout else 0.0

    def seconds(layout):
        prefill, decode = by_entry(layout)
        return prefill + 0.1 * padded(layout), decode + 0.02 * padded(layout)

    server = FakeServer(seconds)
    entries = dict.fromkeys(("gla", "gla@0"), 11)
    cost = calibrate(make_meter(server), LAYERS, entries, cache_bytes, padded=padded)
    assert len(server.opened) == 5  # the backbone, an entry each, a mixture to fit and one to check
    assert cost.trusted and cost.largest_relative_error < 1e-6
    mixed = ("gla", *("gla@0",) * 6, *(None,) * 5)
    assert cost.predicted(mixed).first_token_seconds == pytest.approx(seconds(mixed)[0])
    server.opened.clear()
    calibrate(make_meter(server), LAYERS, {"gla": 11}, cache_bytes, padded=padded)
    assert len(server.opened) == 3  # nothing to pad


def test_calibration_is_trusted_where_time_adds_up():
    server = FakeServer(additive)
    cost = calibrate(make_meter(server), LAYERS, {"gla": 12}, cache_bytes)
    assert cost.trusted and cost.largest_relative_error < 0.05
    assert [replaced(check.layout) for check in cost.checks] == [6]  # half of the eleven that can be replaced at most
    assert {replaced(layout) for layout in server.opened} == {0, 6, 11}
    assert cost.speedup(gla(3)) == pytest.approx(6.0 / sum(additive(gla(3))))
    assert len(server.opened) == 3  # predicted, not measured
    assert cost.measure(gla(3)).speedup == pytest.approx(cost.speedup(gla(3)))


def test_calibration_of_two_forms_is_checked_on_a_mixture():
    def seconds(layout):
        return 4.0 - 0.2 * layout.count("gla") - 0.1 * layout.count("gated_deltanet"), 2.0

    cost = calibrate(make_meter(FakeServer(seconds)), LAYERS, {"gla": 12, "gated_deltanet": 10}, cache_bytes)
    assert cost.trusted
    (check,) = cost.checks
    assert check.layout.count("gla") == 3 and check.layout.count("gated_deltanet") == 2


def test_a_bent_curve_is_fitted_again_with_the_checked_point():
    """Half the layers save nearly everything: the straight line is off, the bent one is not."""

    def seconds(layout):
        return 4.0 - 0.3 * min(6, replaced(layout)) - 0.01 * max(0, replaced(layout) - 6), 2.0

    cost = calibrate(make_meter(FakeServer(seconds)), LAYERS, {"gla": 12}, cache_bytes)
    assert cost.trusted
    assert cost.speedup(gla(3)) == pytest.approx(6.0 / sum(seconds(gla(3))), rel=0.01)


def test_a_model_that_fails_twice_measures_instead():
    def seconds(layout):  # no curve over counts: every third count is half as fast again
        return (4.0 if replaced(layout) % 3 else 6.0), 2.0

    server = FakeServer(seconds)
    cost = calibrate(make_meter(server), LAYERS, {"gla": 12}, cache_bytes)
    assert not cost.trusted and cost.largest_relative_error > 0.05
    assert cost.speedup(full(LAYERS)) == 1.0
    for n in (1, 2, 4, 5):
        assert cost.speedup(gla(n)) == pytest.approx(8.0 / sum(seconds(gla(n)))), n
    opened = len(server.opened)
    cost.speedup(gla(5))
    cost.predicted_speedup(gla(7))
    assert len(server.opened) == opened
    assert cost.to_dict()["trusted"] is False


def test_a_model_that_foretells_two_measurements_is_trusted_again():
    """Checks at half, a quarter and three quarters were disturbed; the layouts that the search asks about are not."""

    def seconds(layout):
        prefill, decode = additive(layout)
        return prefill * (1.3 if replaced(layout) in (3, 9) else 1.0), decode * (1.3 if replaced(layout) == 6 else 1.0)

    server = FakeServer(seconds)
    cost = calibrate(make_meter(server), LAYERS, {"gla": 12}, cache_bytes)
    assert not cost.trusted
    for n in (10, 11, 7, 8, 2, 1):
        asked = len(server.opened)
        was_trusted = cost.trusted
        assert cost.speedup(gla(n)) == pytest.approx(6.0 / sum(additive(gla(n))), rel=0.05), n
        assert (len(server.opened) == asked) == was_trusted
        if cost.trusted:
            break
    assert cost.trusted and n != 1
    assert cost.largest_relative_error > 0.05  # what was found wrong stays on record
