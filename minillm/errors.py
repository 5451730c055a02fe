"""The error contract: what the user can fix is one line on stderr and exit code 2, no traceback.

A script runs its main under `with friendly_errors():` (a context manager, so that it adds no
frame between the script and the softmax). Exit codes: 0 done, 1 our bug, 2 the user's to fix,
3 numeric failure, 130 interrupted, 141 nobody reads on (`| head`), 143 told to stop (SIGTERM).
"""

import atexit
import bdb
import operator
import os
import select
import signal
import sys
import threading
import traceback
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can fix. The message reads `WHERE: what is wrong; what to do`."""


def whole_number(value: object, name: str, wanted: str) -> int:
    """A value as an int. Errors: UserError saying what is wanted, for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} {value!r}: {wanted}") from None


class NumericError(ArithmeticError):
    """The numbers broke down (NaN or infinite loss, too many skipped steps): exit code 3."""


class Interrupted(BaseException):
    """A signal asked for an end: exit code 128 + its number. `where` tells how to go on."""

    def __init__(self, number: int, where: str):
        super().__init__(f"interrupted: {where}")
        self.code = 128 + number


def _stop(number: int, frame) -> None:
    raise Interrupted(number, "stopped")


@contextmanager
def friendly_errors():
    """Turns the exceptions of a script's body into one line on stderr and an exit code."""
    in_main = threading.current_thread() is threading.main_thread()
    kept = signal.signal(signal.SIGTERM, _stop) if in_main else None
    if in_main:  # by then all is done and told: Ctrl-C shall not add a traceback of Python's exit
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if getattr(sys.stdout, "errors", None) == "strict":  # on what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        _flush()  # what fails here would be told after the end, in four lines
    except (UserError, NumericError, OSError, MemoryError, KeyboardInterrupt, Interrupted) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.exit(128 + signal.SIGPIPE)
        print(_one_line(error), file=sys.stderr)
        sys.exit(_exit_code(error))
    except bdb.BdbQuit:  # q in the debugger
        raise
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        no_memory = "out of memory" in message.lower() or "can't allocate" in message
        if not no_memory or "--debug" in sys.argv:
            traceback.print_exc()
        if not no_memory:
            print("This is a bug of ours: please report it with the lines above.", file=sys.stderr)
            sys.exit(1)
        remedy = "lower --batch-size or --max-length, or add --gradient-checkpointing"
        print(f"error: out of memory: {message}; {remedy}", file=sys.stderr)
        sys.exit(2)
    finally:
        try:
            _flush()
        except OSError:  # told already: Python shall not try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if in_main:
            signal.signal(signal.SIGTERM, kept)


def _reader_left() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush() -> None:
    if sys.stdout is not None:  # closed by the shell
        sys.stdout.flush()


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return str(error) or "interrupted"
    if isinstance(error, MemoryError):
        return "error: out of memory; lower --batch-size or --max-length, or use a smaller model"
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}; check path, rights and space"
    if isinstance(error, OSError):
        return f"error: {error.strerror or error}; check rights and space of the folder written to"
    return "error: " + " ".join(str(error).split())


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Interrupted):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 3 if isinstance(error, NumericError) else 2
