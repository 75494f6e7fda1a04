"""The command line: `main` reads the options, runs the command and turns errors into one sentence.

Nothing heavy is imported before a command runs, so that `flowfast --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import tyro

from flowfast.cli.options import Command, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        Exit code: 0 done, 1 the run failed, 2 the call was wrong, 130 stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments == ["--version"]:
            from importlib.metadata import version

            print(f"flowfast {version('flowfast')}")
            return 0
        command = _parse(arguments)
        if command is None:
            return 0
        # Read when torch is loaded, just below. Threads that spin while they wait slow a training tenfold as soon as
        # another program wants the same cores; threads that sleep cost a tenth of the speed at most.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from flowfast.cli import commands

        return commands.run(command)
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return _complain("stopped; finished stages are kept: the same call goes on", 130)
    except Exception as error:
        if os.environ.get("FLOWFAST_TRACEBACK"):
            raise
        known = isinstance(error, RuntimeError | OSError | ValueError | ModuleNotFoundError)
        hint = "" if known else " (a bug: FLOWFAST_TRACEBACK=1 shows where)"
        return _complain(f"{'' if known else type(error).__name__ + ': '}{error}{hint}", 1)


def _complain(message: str, code: int) -> int:
    print(f"flowfast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> Command | None:
    """The command that the arguments spell; None when they asked for help, which tyro has printed."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(
                Command,
                prog="flowfast",
                description="Exact Gaussian-mixture flows, and few-step students distilled from them.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise UsageError(_first_sentence(screen.getvalue())) from stop


def _first_sentence(box: str) -> str:
    """What went wrong, out of the box that tyro draws around it: a title, a rule, the sentence, a rule, hints."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]
    ruled = [not line or line.startswith(("─", "-----", "╰", "+--")) for line in lines]
    first = ruled.index(False) if False in ruled else 0
    last = ruled.index(True, first) if True in ruled[first:] else len(lines)
    return f"{' '.join(' '.join(lines[first:last]).split()).rstrip('.')}; flowfast --help lists commands and options"
