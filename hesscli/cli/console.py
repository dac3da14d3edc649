"""What a run says, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from hesscli import world
from hesscli.errors import HesscliError, first_line, printable
from hesscli.results import Observe, Snapshot
from hesscli.units import duration

# -- Signs of life: what is being done, the estimate so far, and the time left ---------------------


class _Phase:
    """The phase that a run is in, from whose beginning the time left is foretold."""

    def __init__(self) -> None:
        self._first: Snapshot | None = None
        self._began = 0.0

    def begins(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is the first of a phase."""
        if self._first is not None and self._first.phase == snapshot.phase:
            return False
        self._first, self._began = snapshot, time.monotonic()
        return True

    def left(self, snapshot: Snapshot) -> str:
        """The time until it ends."""
        assert self._first is not None  # it has begun
        return describe_time_left(self._first, snapshot, time.monotonic() - self._began)


class ProgressLine:
    """One redrawn line on a terminal, gone when the work is done; nothing elsewhere."""

    def __init__(self, console: RichConsole, *, live: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[estimate]}"),
            console=console,
            transient=True,
            disable=not live,
        )
        self._task: TaskID | None = None
        self._phase = _Phase()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def observe(self, snapshot: Snapshot) -> bool:
        """Redraw the line; asks to stop where this rank, of many, has had a signal to end."""
        if self._phase.begins(snapshot):
            self._begin(snapshot)
        assert self._task is not None
        self._progress.update(
            self._task,
            total=snapshot.total,
            completed=snapshot.done or 0.0,
            left=self._phase.left(snapshot),
            estimate=describe_estimate(snapshot),
        )
        return world.is_signalled()

    def _begin(self, snapshot: Snapshot) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(snapshot.phase, total=None, left="", estimate="")


SIGN_OF_LIFE = 30.0
"""Seconds between two lines of a run whose one line cannot be redrawn."""


class SignsOfLife:
    """A new line now and then, for logs and pipes.

    Args:
        say: takes a line.
        began: when the process did, by :func:`time.monotonic`.
    """

    def __init__(self, say: Callable[[str], None], began: float) -> None:
        self._say, self._began = say, began
        self._next = began + SIGN_OF_LIFE
        self._phase = _Phase()

    def observe(self, snapshot: Snapshot) -> bool:
        """Say where the run is, if nothing was said for long; asks to stop as the other does."""
        self._phase.begins(snapshot)
        if (now := time.monotonic()) >= self._next:
            self._next = now + SIGN_OF_LIFE
            self._say(self._line(snapshot, now - self._began))
        return world.is_signalled()

    def _line(self, snapshot: Snapshot, seconds: float) -> str:
        far, total = snapshot.done, snapshot.total
        parts = [f"{duration(seconds)}: {snapshot.phase}"]
        if far is not None:
            parts.append(f"{far:.4g} of {total:.4g}" if total is not None else f"{far:.4g} so far")
            parts.append(self._phase.left(snapshot))
        return ", ".join((*parts, *filter(None, (describe_estimate(snapshot),))))


def describe_time_left(first: Snapshot, now: Snapshot, seconds: float) -> str:
    """Time left in a phase, from the rate in the ``seconds`` since its first snapshot."""
    if now.total is None or now.done is None:
        return "time left unknown"
    done = now.done - (first.done or 0.0)
    if done <= 0:
        return "time left unknown"
    return f"{duration(max(now.total - now.done, 0.0) * seconds / done)} left"


def describe_estimate(snapshot: Snapshot) -> str:
    """The estimate and half the width of its interval, as far as they are known."""
    if snapshot.estimate is None:
        return ""
    low, high = snapshot.interval or (-math.inf, math.inf)
    half = (high - low) / 2
    return f"{snapshot.estimate:.5g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


# -- What a run says, and where: results on stdout, everything else on stderr ----------------------


_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, unless COLUMNS says otherwise."""


class _Rich(RichConsole):
    """A rich console that leaves a closed pipe to the caller instead of ending the process.

    Names of layers and tensors come from files: what a terminal would obey in them is spelled.
    """

    def on_broken_pipe(self) -> None:
        raise

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """As rich does, without a control character that is not its own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


@dataclass(frozen=True)
class Console:
    """The two streams, and how much to say on them.

    ``live`` is true where stderr is a terminal on which one line can be redrawn. Of many ranks one
    speaks; the others are ``silent`` but for an error that nobody else has told of.
    """

    out: RichConsole
    err: RichConsole
    live: bool
    began: float
    quiet: bool = False
    verbose: bool = False
    silent: bool = False

    @classmethod
    def open(cls, began: float) -> Console:
        """Look at the process's streams and environment, once.

        Args:
            began: when the process did, by :func:`time.monotonic`.
        """
        stdout = sys.stdout = _writable(sys.stdout)
        stderr = sys.stderr = _writable(sys.stderr)
        silent = world.is_silent()
        live = stderr.isatty() and os.environ.get("TERM") != "dumb" and not silent
        return cls(out=_rich(stdout), err=_rich(stderr), live=live, began=began, silent=silent)

    def left(self, budget: float | None) -> float | None:
        """What is left of a budget that counts from the start of the process."""
        return None if budget is None else max(budget - (time.monotonic() - self.began), 1e-3)

    def show(self, result: RenderableType) -> None:
        """A result for people, to stdout."""
        self.out.print(result)

    def write(self, document: str) -> None:
        """A result for programs, to stdout, as it is."""
        self.out.file.write(document)

    def note(self, text: str) -> None:
        """A line that -q silences."""
        if not (self.quiet or self.silent):
            self._say(Text(text))

    def warn(self, *warnings: str) -> None:
        """Lines that warn, which -q silences too."""
        for text in () if self.quiet or self.silent else warnings:
            self._say(Text.assemble(("warning: ", "yellow"), text))

    def error(self, error: HesscliError) -> None:
        """An error's lines, whatever -q says; of many ranks one says what all have met."""
        if not world.may_speak():
            return
        self._say(Text.assemble(("error: ", "bold red"), str(error)))

    @contextmanager
    def working(self) -> Iterator[Observe]:
        """A stretch of long work: signs of life, and a stdout that only results reach.

        Whatever the user's own code prints, or a library warns about, goes to stderr.
        """
        with warnings.catch_warnings(), redirect_stdout(self.err.file):
            warnings.showwarning = lambda message, *_, **__: self.warn(
                first_line(message) or "no message"
            )
            with ProgressLine(self.err, live=self.live and not self.quiet) as line:
                signs = SignsOfLife(self.note, self.began)
                observe = line.observe if self.live else signs.observe
                yield self._announcing(observe) if self.verbose else observe

    def abandon(self) -> None:
        """Let nothing more be written: a reader has closed the pipe."""
        # Otherwise the interpreter flushes at exit and complains about the pipe again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (self.out.file, self.err.file):
            with suppress(OSError):
                os.dup2(nowhere, stream.fileno())

    def flush(self) -> None:
        """Write out what is buffered, while errors can still be told."""
        self.out.file.flush()
        self.err.file.flush()

    def _say(self, text: Text) -> None:
        self.err.print(text, soft_wrap=True)

    def _announcing(self, observe: Observe) -> Observe:
        began = time.monotonic()
        said: set[tuple[str, bool]] = set()

        def announce(snapshot: Snapshot) -> bool:
            """Say each phase as it begins, and the first estimate in it."""
            news = (snapshot.phase, snapshot.estimate is not None)
            if news not in said:
                said.add(news)
                seconds, estimate = time.monotonic() - began, describe_estimate(snapshot)
                self.note(f"{seconds:8.1f} s  {snapshot.phase}  {estimate}".rstrip())
            return observe(snapshot)

        return announce


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Make a first signal to end raise KeyboardInterrupt, and a second end the process at once.

    These are Ctrl-C, and what schedulers and closed terminals send: SIGTERM and SIGHUP. What the
    caller has ignored (nohup, a background job) or handled stays so.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            if world.takes_note():
                return
            raise KeyboardInterrupt
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the live line hides the cursor
        os._exit(128 + number)

    usual = {number: signal.getsignal(number) for number in _ENDING}
    ours = {
        n: old for n, old in usual.items() if old in (signal.default_int_handler, signal.SIG_DFL)
    }
    for number in ours:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, old in ours.items():
            signal.signal(number, old)


def _writable(stream: TextIO | None) -> TextIO:
    """The stream, which from now on writes ``?`` for what its encoding lacks."""
    if stream is None:  # closed by the caller, as with ``>&-``
        return open(os.devnull, "w", encoding="utf-8")
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return stream


def _rich(stream: TextIO) -> RichConsole:
    colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    width = _width(stream)
    return _Rich(file=stream, width=width, color_system=colors, highlight=False, emoji=False)


def _width(stream: TextIO) -> int | None:
    """Columns, where COLUMNS says so or the stream is no terminal; some schedulers set it to 0."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if not stream.isatty():
        return PIPE_WIDTH
    return os.get_terminal_size(stream.fileno()).columns or PIPE_WIDTH
