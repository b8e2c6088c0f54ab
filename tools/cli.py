"""The command `bitfold`: formats, quantize, inspect, explain, diagnose, viz, plot, run, bench, tune and demo.

In: arguments. Out: tables on the terminal, files where asked for, and an exit status: 0, or with one sentence
on stderr 2 for something asked for that cannot be, 1 when the disk or the terminal fails.

    bitfold formats
    bitfold quantize --recipe int8_all -o smollm2.safetensors
    bitfold inspect smollm2.safetensors
    bitfold run --recipe stored --prompt "Why is the sky blue?"

`--plugin FILE.py` imports a file that registers formats, passes or targets; it may stand anywhere and be
repeated.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console

from .._version import __version__
from ..formats import BitfoldError
from .commands import COMMANDS
from .plugins import import_file

EXAMPLES = """\
examples:
  bitfold demo                                   what there is to see, in a few minutes
  bitfold formats 'int4[g128]' mxfp4             what a format is and what it costs
  bitfold quantize --recipe int8_all -o m.safetensors
  bitfold inspect m.safetensors                  what a file holds
  bitfold explain --recipe 'int4[g64]'           what became of each module, and what to try
  bitfold viz --recipe 'int4[g64]' -o page.html  the same as a page
  bitfold diagnose --recipe 'int4[g64]'          which layers lose the quality
  bitfold run --recipe stored --prompt "Why is the sky blue?"
  bitfold bench --recipe none --recipe int8_all  how fast it decodes
  bitfold tune --recipe int4                     the fastest kernels for it on this GPU

A recipe is a name (int8, int4, int8_all, fp8, mxfp4, stored, ...), a format (int4[g64]), or a JSON file.
`bitfold COMMAND --help` says what a command takes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    try:
        plugins, rest = _plugin_option().parse_known_args(arguments)
        for path in plugins.plugin:
            import_file(path)
        chosen = parser().parse_args(rest)
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            chosen.run(chosen, Console())
    except BitfoldError as error:
        print(f"bitfold: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"bitfold: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bitfold: stopped", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    out = argparse.ArgumentParser(
        prog="bitfold",
        description="Make a PyTorch model small and fast, and see what was done to it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_plugin_option()],
        allow_abbrev=False,
    )
    out.add_argument("--version", action="version", version=f"bitfold {__version__}")
    commands = out.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].removesuffix("_command")
        command = commands.add_parser(
            name,
            help=module.ABOUT,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[_plugin_option()],
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return out


def _plugin_option() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    out.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="import this file first: it registers formats, passes or targets (may be repeated)",
    )
    return out


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In the place of Python's own, which adds a line of this package's code."""
    print(f"bitfold: {message}", file=sys.stderr)


def _quiet() -> None:
    """Nothing here goes to the network, and other libraries' chatter is no part of an answer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torchao")


if __name__ == "__main__":
    sys.exit(main())
