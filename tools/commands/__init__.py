"""One file a command: `ABOUT` in a line, `add_arguments(parser)`, and `run(arguments, console)`. A file's
docstring is the command's help.
"""

from . import (
    bench_command,
    demo_command,
    diagnose_command,
    explain_command,
    formats_command,
    inspect_command,
    plot_command,
    quantize_command,
    run_command,
    tune_command,
    viz_command,
)

COMMANDS = (
    formats_command,
    quantize_command,
    inspect_command,
    explain_command,
    viz_command,
    plot_command,
    diagnose_command,
    run_command,
    bench_command,
    tune_command,
    demo_command,
)

__all__ = ["COMMANDS"]
