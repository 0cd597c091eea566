"""What every command has in common: flags from a settings model, logging, signals, exit codes."""

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

from cyclopts import App, CycloptsError, Parameter

import pipeline
from pipeline.errors import EverymaskError, SettingsError

INTERRUPTED: Final = 130
_log = logging.getLogger("everymask")


def run_command(job: Callable[..., int], name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code.

    Args:
        job: Takes its flags as keyword arguments and returns the exit code. Its docstring is the help.
        name: As the user types it, `python -m NAME`.
        arguments: Those after the command's name; by default the process's.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    _log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` and spot reclaims
    app = App(name=f"python -m {name}", version=pipeline.__version__, default_parameter=Parameter(negative=""))
    app.default(job)
    try:
        code: Any = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        code = SettingsError.exit_code  # cyclopts has printed what is wrong
    except EverymaskError as error:
        _log.error("%s: %s", type(error).__name__, error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
