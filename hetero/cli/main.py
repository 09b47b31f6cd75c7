"""`hetero`: the command group, and how whatever a command raises ends the process."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

import hetero
from hetero.errors import ExitCode, HeteroError, UsageError
from hetero.terminal_text import one_line

# First lines of the commands' own help, here so that `hetero --help` loads none of them.
SHORT_HELP = {
    "plan": "Say where a model goes on this machine, how fast it will be, and what limits it.",
    "run": "Generate text with a model, under a plan; shows predicted beside measured.",
    "profile": "Measure this machine: CPU by thread count, GPU and link where there is one.",
    "doctor": "Check Python, torch, CPU, memory, GPU and stored files; exit 6 if something is "
    "broken.",
}
_WITH_NUMBA = ("run", "profile")

_EXIT_CODES = """
\b
Exit codes:
  0    ok
  1    internal error
  2    usage: an option, a prompt or a plan that does not apply
  3    the batch finished with failed rows
  4    the plan does not fit the memory
  5    the model folder is invalid or not supported
  6    environment: GPU, driver, package, file system
  7    the output exists, is locked, or cannot be resumed
  130  interrupted
  143  terminated
"""


class _Commands(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(SHORT_HELP)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return _load(name) if name in SHORT_HELP else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SHORT_HELP.items()))


@functools.cache
def _load(name: str) -> click.Command:
    command: click.Command = getattr(import_module(f"hetero.cli.{name}"), name)
    if name in _WITH_NUMBA and command.callback is not None:
        command.callback = _with_kernel_cache(command.callback)
    return command


def _with_kernel_cache(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a command, once there is a folder for compiled kernels."""

    @functools.wraps(body)
    def prepared(*args: Any, **options: Any) -> Any:
        from hetero.cli.machine import use_kernel_cache

        use_kernel_cache()
        return body(*args, **options)

    return prepared


@click.group(
    cls=_Commands,
    epilog=_EXIT_CODES,
    context_settings={
        "auto_envvar_prefix": "HETERO",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(hetero.__version__, prog_name="hetero", message="%(prog)s %(version)s")
def cli() -> None:
    """Run language models larger than the GPU's memory at the best speed of one machine.

    MODEL is a folder in Hugging Face layout, an org/name in the local hub cache, or, to plan only,
    the name of a model profile. Without MODEL a small model that ships with hetero is used.
    Nothing is downloaded. Every option can be set in the environment, as HETERO_RUN_MAX_TOKENS.
    """
    from cpu_kernels.isa import ENVIRONMENT_VARIABLE, choose_isa

    try:  # before a kernel is imported, which has no better error than this one
        choose_isa({}, os.environ.get(ENVIRONMENT_VARIABLE))
    except ValueError as error:
        raise UsageError(str(error)) from error


class _Terminated(BaseException):
    """SIGTERM, as an exception: lanes stop and the terminal is restored on the way out."""


def main() -> int:
    """Run the command line and return its exit code; the console script."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    # A terminal of a few characters gets the others as \\u escapes instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    return run_command(sys.argv[1:])


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code; every exception ends here, as one line."""
    try:
        code = cli.main(arguments, prog_name="hetero", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else ExitCode.OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", ExitCode.INTERRUPTED)
    except _Terminated:
        return _fail("terminated", ExitCode.TERMINATED)
    except SystemExit as error:
        # click's own answer to a closed pipe
        return error.code if isinstance(error.code, int) else ExitCode.INTERNAL
    except BrokenPipeError:
        return _broken_pipe()
    except HeteroError as error:
        return _fail(f"error: {error}", error.exit_code)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"error: {where}{error.strerror or error}", ExitCode.ENVIRONMENT)
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if isinstance(error, ModuleNotFoundError):
        return _fail(
            f"error: the Python package {error.name} is missing; install hetero again, with pip",
            ExitCode.ENVIRONMENT,
        )
    from planner.errors import ModelSpecError, PlannerError, ProfileError

    code = ExitCode.USAGE
    if isinstance(error, ModelSpecError):
        code = ExitCode.MODEL_INVALID
    elif isinstance(error, ProfileError):
        code = ExitCode.ENVIRONMENT
    if isinstance(error, PlannerError):
        return _fail(f"error: {error}", code)
    if os.environ.get("HETERO_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    return _fail(
        f"internal error: {type(error).__name__}: {error}; please report; run with HETERO_DEBUG=1 "
        "for the traceback",
        ExitCode.INTERNAL,
    )


def _fail(line: str, code: ExitCode) -> int:
    click.echo(one_line(line), err=True)
    return code


def _broken_pipe() -> int:
    # The interpreter flushes stdout once more at exit, which would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.INTERNAL


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
