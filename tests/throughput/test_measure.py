"""Measurements alternate with the backbone and are remembered."""

import numpy as np
import pytest

from dtr_deploy.engines.base import Engine, Workload
from dtr_deploy.hybrid.layout import full, replaced
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.throughput.cost_model import layout_of_counts
from dtr_deploy.throughput.measure import Comparison, ThroughputMeter, _median_error, compare_with_base
from tests.throughput.fake import FakeServer

LAYERS = 12
WORKLOAD = Workload(4096, 512)


def gla(n: int):
    return layout_of_counts(LAYERS, {"gla": n})


def additive(layout):
    return 4.0 - 0.2 * replaced(layout), 2.0 - 0.05 * replaced(layout)


def make_meter(server, ledger=None, **options) -> ThroughputMeter:
    return ThroughputMeter(server, WORKLOAD, ledger or Ledger(":memory:"), "inputs", **options)


def test_the_fake_is_an_engine():
    with FakeServer(additive)(full(LAYERS)) as engine:
        assert isinstance(engine, Engine)


@pytest.mark.parametrize("max_open", [1, 2, 3, 10])
def test_ratios_are_right_and_engines_few(max_open):
    server = FakeServer(additive)
    layouts = [gla(4), gla(8), gla(11)]
    comparisons = list(compare_with_base(server, layouts, WORKLOAD, 3, max_open))
    assert [comparison.layout for comparison in comparisons] == layouts
    for comparison in comparisons:
        prefill, decode = additive(comparison.layout)
        assert comparison.speedup == pytest.approx(6.0 / (prefill + decode))
        assert comparison.prefill_ratio == pytest.approx(prefill / 4.0)
        assert comparison.decode_ratio == pytest.approx(decode / 2.0)
        assert comparison.hybrid.repeats == 3 and comparison.hybrid.workload == WORKLOAD
    assert server.most_open == min(max_open, 4) and server.open_now == 0
    if max_open > 1:
        assert server.opened.count(full(LAYERS)) == 1


def test_a_drifting_machine_does_not_bend_the_ratio():
    """Ten percent slower with every run: measured one after the other the ratio would be off by a third."""
    server = FakeServer(additive, drift=0.1)
    (comparison,) = compare_with_base(server, [gla(8)], WORKLOAD, repeats=4)
    # Even rounds: rounds that run forwards and backwards alternate, and their errors cancel to first order.
    assert comparison.speedup == pytest.approx(6.0 / sum(additive(gla(8))), rel=0.02)
    assert server.runs[:4] == [full(LAYERS), gla(8), gla(8), full(LAYERS)]


@pytest.mark.parametrize("disturbed", [{0}, {1}, {3}, {1, 4}, {0, 5}])
def test_a_disturbed_round_is_made_again(disturbed):
    server = FakeServer(additive, disturbed=disturbed)
    (comparison,) = compare_with_base(server, [gla(8)], WORKLOAD, repeats=2)
    assert comparison.speedup == pytest.approx(6.0 / sum(additive(gla(8))))
    assert 2 < comparison.base.repeats <= 6


def test_rounds_that_never_agree_end():
    server = FakeServer(additive, drift=1.0)
    (comparison,) = compare_with_base(server, [gla(8)], WORKLOAD, repeats=2)
    assert comparison.base.repeats == 6


def test_the_error_of_a_median_is_what_repeating_it_shows():
    rng = np.random.default_rng(0)
    rounds = 1.2 * (1 + 0.03 * rng.standard_normal((4000, 9)))
    seen = np.median(rounds, axis=1).std() / 1.2
    assert np.mean([_median_error(row) for row in rounds.tolist()]) == pytest.approx(seen, rel=0.15)
    disturbed = [*rounds[0, :8].tolist(), 5.0]
    assert _median_error(disturbed) < 2 * _median_error(rounds[0].tolist())


def test_a_single_round_has_no_error():
    server = FakeServer(additive)
    (once,) = compare_with_base(server, [gla(8)], WORKLOAD, repeats=1)
    (thrice,) = compare_with_base(server, [gla(8)], WORKLOAD, repeats=3)
    assert once.errors == {} and thrice.errors == pytest.approx({"prefill": 0, "decode": 0, "speedup": 0})


def test_a_workload_of_one_output_token_has_no_decode():
    (comparison,) = compare_with_base(FakeServer(lambda layout: (additive(layout)[0], 0.0)), [gla(4)], WORKLOAD, 2)
    assert comparison.decode_ratio == 1.0
    assert comparison.speedup == pytest.approx(4.0 / 3.2)


def test_comparison_round_trip():
    (comparison,) = compare_with_base(FakeServer(additive), [gla(4)], WORKLOAD, 2)
    assert Comparison.from_dict(comparison.to_dict()) == comparison


def test_layouts_with_equal_counts_are_measured_once(tmp_path):
    server = FakeServer(additive)
    other = ("gla",) * 4 + (None,) * 8
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first, second = make_meter(server, ledger).compare([gla(4), other])
    assert first == second and len(set(server.opened)) == 2
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert make_meter(server, ledger).compare([other]) == [first]
        assert len(server.opened) == 2
        make_meter(server, ledger).compare([gla(5), gla(4)])
    assert server.opened[2:] == [full(LAYERS), gla(5)]


def test_a_meter_without_stand_ins_measures_each_layout():
    server = FakeServer(additive)
    other = ("gla",) * 4 + (None,) * 8
    meter = make_meter(server, stand_in=lambda layout: layout)
    assert [comparison.layout for comparison in meter.compare([gla(4), other])] == [gla(4), other]
    assert server.opened == [full(LAYERS), gla(4), other]


def test_what_was_measured_before_a_crash_is_kept():
    def seconds(layout):
        if replaced(layout) == 8:
            raise RuntimeError("the engine died")
        return additive(layout)

    ledger, server = Ledger(":memory:"), FakeServer(seconds)
    with pytest.raises(RuntimeError):
        make_meter(server, ledger).compare([gla(4), gla(8)])
    assert [replaced(trial.key.layout) for trial in ledger.trials(kind="throughput")] == [4]
    assert server.open_now == 0


def test_progress_is_told():
    seen = []
    meter = make_meter(FakeServer(additive), progress=lambda *report: seen.append(report))
    meter.compare([gla(4), gla(8)])
    assert seen == [(0, 2, "measuring throughput with 4 gla"), (1, 2, "measuring throughput with 8 gla")]
