"""The bar that a person sees while waiting, in one look for every command.

In: a console. Out: rich's Progress, gone when the wait is over, and silent where nobody watches (a file, CI).

    with progress_bar(console) as show: task = show.add_task("quantizing", total=210)
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def progress_bar(console: Console) -> Progress:
    """Descriptions are plain text: `int4[g64]` is no markup."""
    what = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), what, BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
