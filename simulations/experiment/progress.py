"""Progress bars across processes: workers write their progress to files, this process draws."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OnStep = Callable[[int, int], None]


def progress_writer(folder: Path, name: str) -> OnStep:
    """Return a callback `(done, total)` that updates a file about 100 times in all."""
    path = folder / f"{name}.json"

    def write(done: int, total: int) -> None:
        if done == total or done % max(1, total // 100) == 0:
            part = path.with_suffix(".part")
            part.write_text(json.dumps([done, total]))
            part.replace(path)

    return write


def counter(on_step: OnStep, total: int) -> Callable[[], None]:
    """Return a callback without arguments that counts its own calls."""
    steps = itertools.count(1)
    return lambda: on_step(next(steps), total)


@contextmanager
def progress_bars(folder: Path, console: Console) -> Iterator[None]:
    """Draw one bar for each file that a `progress_writer` writes to a folder."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=console)
    tasks = {}

    def update() -> None:
        for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
            done, total = json.loads(path.read_text())
            if path.stem not in tasks:
                tasks[path.stem] = progress.add_task(path.stem, total=total)
            progress.update(tasks[path.stem], completed=done)

    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.5):
            update()

    thread = threading.Thread(target=poll, daemon=True)
    with progress:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()
