"""Progress: what is printed without a terminal, and when Ctrl-C takes effect."""

import io
import os
import signal

import pytest
from rich.console import Console

from dtr_deploy.progress import (
    CountingBar,
    PlainProgress,
    QuietProgress,
    RichProgress,
    StopRequest,
    for_terminal,
    seconds_text,
)


def test_plain_lines_say_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with PlainProgress(out=out).bar("distill", total=100) as bar:
        bar.advance(10)  # 5 s: too soon
        bar.advance(10, note="error 0.3")  # 20 s
        bar.advance(10)  # 21 s: too soon again
    assert out.getvalue() == "distill: 20 of 100, about 1 min 20 s left, error 0.3\n"


def test_rich_bars_nest_and_print_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = RichProgress(console)
    with progress.bar("outer", total=2) as outer:
        with progress.bar("inner", total=5) as inner:
            inner.advance(5, note="half")
        outer.advance(1)
        progress.line("stays [not markup]")
    assert "stays [not markup]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_without_a_terminal_there_are_plain_lines() -> None:
    assert isinstance(for_terminal(), PlainProgress)


@pytest.mark.parametrize("progress", [QuietProgress(), PlainProgress(out=io.StringIO())])
def test_ctrl_c_takes_effect_at_the_next_unit(progress: QuietProgress | PlainProgress) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), progress.stop.listening(progress), progress.bar("work", total=3) as bar:
        bar.advance(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the unit under way is finished")
        bar.advance(1)
        reached.append("too far")
    assert reached == ["the unit under way is finished"]


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt), stop.listening(QuietProgress(stop)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not stopped")
    assert signal.getsignal(signal.SIGINT) is before


def test_counting_reports_become_advances() -> None:
    """Done counts, not steps; a count that starts over opens a new bar, a total that changes meanwhile does not."""
    opened: list[tuple[str, float | None, list[float]]] = []
    totals: list[float | None] = []

    class Recorder(QuietProgress):
        def bar(self, what, total=None):
            advances: list[float] = []
            opened.append((what, total, advances))
            context = super().bar(what, total)

            class Context:
                def __enter__(self):
                    inner = context.__enter__()

                    class Bar:
                        def advance(self, amount=1, note="", total=None):
                            advances.append(amount)
                            totals.append(total)
                            inner.advance(amount, note, total)

                    return Bar()

                def __exit__(self, *exc):
                    return context.__exit__(*exc)

            return Context()

    with CountingBar(Recorder(), "steps") as report:
        for done in (1, 2, 4):
            report(done, 4, "x")
        report(0, 7, "y")
        report(3, 9, "y")
    assert opened == [("steps", 4, [1, 1, 2]), ("steps", 7, [0, 3])]
    assert totals == [4, 4, 4, 7, 9]


def test_a_new_total_is_what_is_left_of(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("dtr_deploy.progress.PLAIN_SECONDS", 0.0)
    with PlainProgress(out=out).bar("work", total=4) as bar:
        bar.advance(2)
        bar.advance(2, total=10)
    lines = out.getvalue().splitlines()
    assert "2 of 4" in lines[0] and "4 of 10" in lines[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
