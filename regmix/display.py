"""What a person sees while a command works.

Enters: how much is done. Leaves: a live line on a terminal (rich), a plain line now and then
elsewhere, all on stderr so that stdout stays for the answer. Knows nothing of what is counted.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from regmix.errors import printable

PLAIN_INTERVAL_SECONDS = 10.0


def console(stderr: bool = False) -> Any:
    """Return a rich console for tables and panels; plain text where there is no terminal."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        """Shows every string as it is: names from files hold no markup and steer no terminal."""

        def render_str(self, text: str, **options: Any) -> Text:
            lines = map(printable, text.split("\n"))
            return super().render_str("\n".join(lines), **options)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 100
    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


class Progress:
    """A progress display: `with Progress("pack", total=100, unit="MB") as p: p.update(3, doc=7)`.

    `update(done, **fields)` takes the absolute amount done and any words to show beside it.
    """

    def __init__(self, title: str, *, total: float, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._live: Any = None
        self._task: Any = None
        self._started = self._last_plain = time.monotonic()
        self._first_done: float | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[amount]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}", markup=False),
                console=console(stderr=True),
                refresh_per_second=4,
            )
            self._live.start()
            self._task = self._live.add_task(self.title, total=self.total, amount="", words="")
        return self

    def update(self, done: float, **fields: object) -> None:
        """Show that `done` of `total` units are finished, with `fields` beside them."""
        if self._first_done is None:
            self._first_done = done
        told = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
        words = printable(told)
        amount = f"{done:,.0f}/{self.total:,.0f} {self.unit}"
        if self._live is not None:
            self._live.update(self._task, completed=done, amount=amount, words=words)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_INTERVAL_SECONDS:
            self._last_plain = now
            line = f"{self.title}: {amount}  eta {self._eta(done)}  {words}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def _eta(self, done: float) -> str:
        gained = done - (self._first_done or 0.0)
        elapsed = time.monotonic() - self._started
        if gained <= 0:
            return "?"
        return duration(elapsed * (self.total - done) / gained)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `42 s`, `3 min 10 s`, `2 h 05 min`."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def count(number: float) -> str:
    """Return a large count shortly: `950`, `12.3k`, `1.05B`."""
    for limit, suffix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "B")):
        # 999,700 is 1M in three digits, not 1e+03k.
        if abs(number) < 0.9995 * limit:
            return f"{number:.0f}" if suffix == "" else f"{number / limit * 1e3:.3g}{suffix}"
    return f"{number / 1e12:.3g}T"
