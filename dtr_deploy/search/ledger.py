"""The ledger: every layout that was scored or measured, in one SQLite file that survives `kill -9`.

A trial is found again by its key, so a search that is started a second time walks the same path and computes only
what is missing. Numbers come back bit for bit: arrays are stored as little-endian float32, scalars as JSON (whose
`repr` of a float64 is exact). `Ledger.memoised` returns what was *stored*, also the first time, so that a resumed and
an uninterrupted search see the same rounding. Nothing here knows what a score means.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dtr_deploy.errors import DtrError
from dtr_deploy.hybrid.layout import Layout, describe

SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)

Status = Literal["scored", "committed", "rejected", "walked_back"]
STATUSES: tuple[str, ...] = get_args(Status)

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL, layout TEXT NOT NULL, split TEXT NOT NULL, inputs TEXT NOT NULL,
    status TEXT NOT NULL, scalars TEXT NOT NULL, seconds REAL NOT NULL, layer_forwards INTEGER NOT NULL,
    finished_at REAL NOT NULL,
    UNIQUE (kind, layout, split, inputs)
);
CREATE TABLE arrays (
    trial INTEGER NOT NULL REFERENCES trials (id) ON DELETE CASCADE,
    name TEXT NOT NULL, shape TEXT NOT NULL, float32 BLOB NOT NULL,
    PRIMARY KEY (trial, name)
) WITHOUT ROWID;
CREATE TABLE steps (
    search TEXT NOT NULL, number INTEGER NOT NULL, step TEXT NOT NULL,
    PRIMARY KEY (search, number)
) WITHOUT ROWID;
"""


class TrialKey(NamedTuple):
    """What a trial's result depends on: the kind of work, the layout, the split (or workload), a hash of the rest."""

    kind: str
    layout: Layout
    split: str
    inputs: str


class TrialResult(NamedTuple):
    """The result of one trial before it is stored. `layer_forwards`: decoder layers run, each over one sequence."""

    scalars: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = {}
    layer_forwards: int = 0


@dataclass(frozen=True)
class Trial:
    """One finished trial, as stored."""

    key: TrialKey
    status: str
    scalars: dict[str, Any]
    seconds: float
    layer_forwards: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)


class Ledger:
    """The trials and steps of one run directory, in the SQLite file `path` (created if missing; ":memory:" works).

    Every write is one transaction that is on the disk when the call returns. Raises `DtrError` for a file that is not a
    ledger, is damaged, was written by a newer dtr-deploy, or cannot be written (a full disk).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with self._errors_in_one_line():
            self._db = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA foreign_keys=ON")
                self._open_schema()
            except BaseException:
                self._db.close()
                raise

    def find(self, key: TrialKey) -> Trial | None:
        """The stored trial of `key`, or None."""
        with self._errors_in_one_line():
            row = self._db.execute(
                "SELECT id, status, scalars, seconds, layer_forwards FROM trials"
                " WHERE kind = ? AND layout = ? AND split = ? AND inputs = ?",
                _columns(key),
            ).fetchone()
            if row is None:
                return None
            arrays = {
                name: np.frombuffer(blob, "<f4").astype(np.float32).reshape(json.loads(shape))
                for name, shape, blob in self._db.execute(
                    "SELECT name, shape, float32 FROM arrays WHERE trial = ? ORDER BY name", (row[0],)
                )
            }
        return Trial(key, row[1], json.loads(row[2]), row[3], row[4], arrays)

    def record(self, key: TrialKey, result: TrialResult, seconds: float, status: Status = "scored") -> None:
        """Store a finished trial; an earlier one with the same key is replaced."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM trials WHERE kind = ? AND layout = ? AND split = ? AND inputs = ?",
                _columns(key),
            )
            cursor = db.execute(
                "INSERT INTO trials"
                " (kind, layout, split, inputs, status, scalars, seconds, layer_forwards, finished_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_columns(key), status, json.dumps(dict(result.scalars)), seconds, result.layer_forwards, time.time()),
            )
            for name, array in result.arrays.items():
                values = np.ascontiguousarray(array, dtype="<f4")
                db.execute(
                    "INSERT INTO arrays (trial, name, shape, float32) VALUES (?, ?, ?, ?)",
                    (cursor.lastrowid, name, json.dumps(values.shape), values.tobytes()),
                )
        split = f" on {key.split}" if key.split else ""
        logger.debug("trial: %s of %s%s, %s, %.1f s", key.kind, describe(key.layout), split, status, seconds)

    def memoised(self, key: TrialKey, compute: Callable[[], TrialResult]) -> Trial:
        """The trial of `key`: read if it is there, else computed, timed, stored and read back."""
        trial = self.find(key)
        if trial is None:
            started = time.perf_counter()
            result = compute()
            self.record(key, result, time.perf_counter() - started)
            trial = self.find(key)
            assert trial is not None
        return trial

    def set_status(self, key: TrialKey, status: Status) -> None:
        """Note what the search decided about a stored trial."""
        with self._transaction() as db:
            db.execute(
                "UPDATE trials SET status = ? WHERE kind = ? AND layout = ? AND split = ? AND inputs = ?",
                (status, *_columns(key)),
            )

    def trials(self, kind: str | None = None, inputs: str | None = None) -> list[Trial]:
        """Stored trials in the order they were finished, without their arrays."""
        with self._errors_in_one_line():
            rows = self._db.execute(
                "SELECT kind, layout, split, inputs, status, scalars, seconds, layer_forwards FROM trials"
                " WHERE (? IS NULL OR kind = ?) AND (? IS NULL OR inputs = ?) ORDER BY id",
                (kind, kind, inputs, inputs),
            ).fetchall()
        return [
            Trial(TrialKey(r[0], decode_layout(r[1]), r[2], r[3]), r[4], json.loads(r[5]), r[6], r[7]) for r in rows
        ]

    def summary(self) -> dict[str, dict[str, float]]:
        """What the stored trials took, by kind: `trials`, `layer_forwards`, `seconds`."""
        with self._errors_in_one_line():
            rows = self._db.execute(
                "SELECT kind, count(*), sum(layer_forwards), sum(seconds) FROM trials GROUP BY kind ORDER BY kind"
            ).fetchall()
        return {kind: {"trials": n, "layer_forwards": work, "seconds": time} for kind, n, work, time in rows}

    def record_step(self, search: str, number: int, step: Mapping[str, Any]) -> None:
        """Store step `number` (from 0) of the search named `search`.

        A resumed search writes its steps again. The first one that differs from what is stored ends the old path: it
        and everything behind it is replaced.
        """
        text = json.dumps(step)
        with self._transaction() as db:
            stored = db.execute("SELECT step FROM steps WHERE search = ? AND number = ?", (search, number)).fetchone()
            if stored is None or stored[0] != text:
                db.execute("DELETE FROM steps WHERE search = ? AND number >= ?", (search, number))
                db.execute("INSERT INTO steps (search, number, step) VALUES (?, ?, ?)", (search, number, text))

    def steps(self, search: str) -> list[dict[str, Any]]:
        """The stored steps of one search, in order."""
        with self._errors_in_one_line():
            rows = self._db.execute("SELECT step FROM steps WHERE search = ? ORDER BY number", (search,)).fetchall()
        return [json.loads(row[0]) for row in rows]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_schema(self) -> None:
        # An exclusive transaction, so that two processes opening a new ledger do not both create the tables.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
            elif "meta" not in tables:
                raise DtrError(f"{self.path}: not a ledger of dtr-deploy (another SQLite file); move it away")
            row = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
            version = None if row is None else int(row[0])
            if version != SCHEMA_VERSION:
                raise DtrError(
                    f"{self.path}: ledger of schema version {version}, this dtr-deploy reads version {SCHEMA_VERSION};"
                    " use the version that wrote it, or a new run directory"
                )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors_in_one_line():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:  # a full disk has already rolled back
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise DtrError(f"{self.path}: the ledger cannot be read or written ({error})") from error
        except sqlite3.DatabaseError as error:
            raise DtrError(f"{self.path}: the ledger is damaged ({error}); remove it to search anew") from error


def encode_layout(layout: Layout) -> str:
    """Canonical text of a layout: a JSON list of form names and nulls."""
    return json.dumps(list(layout), separators=(",", ":"))


def decode_layout(text: str) -> Layout:
    return tuple(json.loads(text))


def _columns(key: TrialKey) -> tuple[str, str, str, str]:
    return key.kind, encode_layout(key.layout), key.split, key.inputs
