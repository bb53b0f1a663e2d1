"""Every way a command can end badly, as text for the user and an exit code; never a raw traceback."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

import typer

from ...ir.errors import HostError, OnelaunchError

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


def report(error: BaseException) -> int:
    """Print what went wrong on stderr; returns the exit code."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # typer exits for it
        return _quiet()
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, SystemExit | typer.Exit):
        code = getattr(error, "exit_code", getattr(error, "code", 0))
        return code if isinstance(code, int) else int(code is not None)
    if hasattr(error, "format_message"):
        return _usage(error)
    error = _of_host(error)
    if isinstance(error, OnelaunchError):
        print(error.show(), file=sys.stderr)
        return error.exit_code
    return _bug(error)


def _usage(error: BaseException) -> int:
    """What typer found wrong with the words of the command line."""
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    if not message:
        return 2  # no arguments: the help was printed
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "onelaunch"
    print(f"error: {message[:1].lower()}{message[1:]}\n\nhint: see `{command} --help`", file=sys.stderr)
    return 2


def _of_host(error: BaseException) -> BaseException:
    """What the machine refused: a file or folder, or memory."""
    if isinstance(error, OSError) and error.filename is not None:
        return HostError(f"{error.strerror}: `{error.filename}`".lower(), hint="check the path and the disk")
    if isinstance(error, OSError) and error.strerror:
        return HostError(error.strerror.lower())
    if isinstance(error, MemoryError):
        return HostError("out of memory", hint="use a shorter --context or fewer --slots, or a smaller model")
    return error


def _bug(error: BaseException) -> int:
    text = "".join(traceback.format_exception(error))
    what = f"internal error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    try:
        handle, path = tempfile.mkstemp(prefix="onelaunch-error-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
        where = f"the traceback is in {path}"
    except OSError:
        where = "the traceback could not be written"
    print(f"{what}; this is a bug, {where}", file=sys.stderr)
    return BUG


def _quiet() -> int:
    """The reader of our output is gone: nothing to say, and nobody to say it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains
    return BROKEN_PIPE
