"""The ledger gives back bit for bit what was stored, survives a kill, and refuses files that are not its own."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dtr_deploy.errors import DtrError
from dtr_deploy.search.ledger import SCHEMA_VERSION, Ledger, TrialKey, TrialResult

KEY = TrialKey("score", (None, "gla", "gated_deltanet"), "search", "abc")


def test_round_trip_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"margins": rng.normal(size=(3, 5)).astype(np.float32), "empty": np.zeros((0, 2), np.float32)}
    arrays["margins"][0, 0] = np.nan
    scalars = {"kl": 0.1 + 0.2, "tiny": 5e-324, "recall": {"needle": -1 / 3}, "tasks": [{"strata": ["1024"]}]}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(KEY, TrialResult(scalars, arrays, 42), seconds=1.25, status="committed")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        trial = ledger.find(KEY)
    assert trial is not None
    assert (trial.key, trial.status, trial.seconds, trial.layer_forwards) == (KEY, "committed", 1.25, 42)
    assert trial.scalars == scalars
    for name, array in arrays.items():
        assert trial.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(trial.arrays[name], array)


def test_a_trial_is_found_by_its_whole_key(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(KEY, TrialResult({}), 0.0)
        others = [
            KEY._replace(kind="screen"),
            KEY._replace(layout=(None, "gla", None)),
            KEY._replace(split="confirm"),
            KEY._replace(inputs="abd"),
        ]
        assert ledger.find(KEY) is not None
        assert [ledger.find(key) for key in others] == [None] * 4


def test_memoised_computes_once_and_rounds_the_first_time_too(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return TrialResult({}, {"x": np.array([0.1], np.float64)})

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = ledger.memoised(KEY, compute)
        second = ledger.memoised(KEY, compute)
    assert len(calls) == 1
    assert first.arrays["x"][0] == second.arrays["x"][0] == np.float32(0.1)


def test_status_and_listing(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(KEY, TrialResult({"n": 1}), 0.5)
        ledger.record(KEY._replace(kind="screen"), TrialResult({"n": 2}), 0.5)
        ledger.set_status(KEY, "rejected")
        assert [(trial.key.kind, trial.status) for trial in ledger.trials()] == [
            ("score", "rejected"),
            ("screen", "scored"),
        ]
        assert [trial.scalars["n"] for trial in ledger.trials(kind="screen")] == [2]
        ledger.record(KEY, TrialResult({"n": 3}), 0.5)
        assert [trial.scalars["n"] for trial in ledger.trials(kind="score")] == [3]


def test_the_summary_adds_up_each_kind():
    with Ledger(":memory:") as ledger:
        ledger.record(KEY, TrialResult({}, {}, 10), 0.5)
        ledger.record(KEY._replace(inputs="b"), TrialResult({}, {}, 5), 0.25)
        ledger.record(KEY._replace(kind="screen"), TrialResult({}, {}, 1), 1.0)
        assert ledger.summary() == {
            "score": {"trials": 2, "layer_forwards": 15, "seconds": 0.75},
            "screen": {"trials": 1, "layer_forwards": 1, "seconds": 1.0},
        }


def test_steps_written_again_keep_the_path_and_a_new_path_replaces_the_old():
    with Ledger(":memory:") as ledger:
        for number, action in enumerate("abc"):
            ledger.record_step("racing", number, {"action": action})
        ledger.record_step("other", 0, {"action": "z"})
        ledger.record_step("racing", 0, {"action": "a"})
        assert [step["action"] for step in ledger.steps("racing")] == ["a", "b", "c"]
        ledger.record_step("racing", 1, {"action": "x"})
        assert [step["action"] for step in ledger.steps("racing")] == ["a", "x"]
        assert [step["action"] for step in ledger.steps("other")] == ["z"]


def test_commits_are_durable(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: fsync at every commit


def test_a_killed_writer_loses_only_the_trial_under_way(tmp_path):
    """A real SIGKILL in the middle of a transaction: what was recorded before is there, the half trial is not."""
    path = tmp_path / "ledger.sqlite"
    program = f"""
    import os, signal
    import numpy as np
    from dtr_deploy.search.ledger import Ledger, TrialKey, TrialResult

    class Deadly(dict):
        def items(self):
            yield "x", np.zeros(1000, np.float32)
            os.kill(os.getpid(), signal.SIGKILL)

    ledger = Ledger({str(path)!r})
    for number in range(3):
        key = TrialKey("score", (None, "gla"), "search", str(number))
        arrays = {{"x": np.full(1000, number, np.float32)}}
        ledger.record(key, TrialResult({{}}, Deadly(arrays) if number == 2 else arrays), 0.1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == -signal.SIGKILL
    with Ledger(path) as ledger:
        assert [trial.key.inputs for trial in ledger.trials()] == ["0", "1"]
        trial = ledger.find(TrialKey("score", (None, "gla"), "search", "1"))
        assert trial is not None
        np.testing.assert_array_equal(trial.arrays["x"], np.full(1000, 1, np.float32))
        assert ledger._db.execute("SELECT count(*) FROM arrays").fetchone() == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not a database at all" * 100), "damaged"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE other (x)"), "not a ledger"),
        (lambda path: path.mkdir(), "cannot be read or written"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, make, message):
    path = tmp_path / "ledger.sqlite"
    make(path)
    with pytest.raises(DtrError, match=message) as caught:
        Ledger(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_newer_schema_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION + 1),))
    with pytest.raises(DtrError, match=f"version {SCHEMA_VERSION + 1}"):
        Ledger(path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(KEY, TrialResult({}), 0.0)
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DtrError, match="full"):
            ledger.record(KEY._replace(inputs="big"), TrialResult({}, {"x": np.zeros(100_000)}), 0.0)
        ledger._db.execute("PRAGMA max_page_count = 1000000")
        ledger.record(KEY._replace(inputs="later"), TrialResult({}), 0.0)
        assert [trial.key.inputs for trial in ledger.trials()] == ["abc", "later"]
