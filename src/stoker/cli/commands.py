"""The command tree: one table from words to modules, each imported when its word is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from stoker.cli.errors import EXIT_FAILED, report, report_line
from stoker.errors import StokerError, exit_code

__all__ = ["invoke"]

COMMANDS: dict[str, tuple[str, str]] = {
    # word: (module:attribute, what help says without importing it)
    "run": ("stoker.cli.run:run", "Run a command in a new microVM."),
    "create": ("stoker.cli.sandboxes:create", "Create a sandbox."),
    "ls": ("stoker.cli.sandboxes:ls", "List sandboxes."),
    "exec": ("stoker.cli.exec:exec_command", "Run a command in a sandbox."),
    "attach": ("stoker.cli.exec:attach", "Join a process of a sandbox."),
    "cp": ("stoker.cli.cp:cp", "Copy files between this host and sandboxes."),
    "logs": ("stoker.cli.logs:logs", "Print a sandbox's console."),
    "port-forward": ("stoker.cli.port:port_forward", "Listen here for ports inside a sandbox."),
    "ssh": ("stoker.cli.ssh:ssh", "Log in to a sandbox with ssh; nothing of ssh has to be in it."),
    "ssh-config": ("stoker.cli.ssh:ssh_config", "Print a configuration for ssh, scp, sftp and rsync."),
    "url": ("stoker.cli.port:url", "Print where the proxy serves a port of a sandbox."),
    "network": ("stoker.cli.network:network", "Policies and published ports of sandboxes."),
    "ps": ("stoker.cli.ps:ps", "List the processes of a sandbox."),
    "kill": ("stoker.cli.ps:kill", "Send a signal to processes of a sandbox."),
    "top": ("stoker.cli.top:top", "Show what sandboxes use."),
    "stop": ("stoker.cli.sandboxes:stop", "Shut sandboxes down; their disks stay."),
    "start": ("stoker.cli.sandboxes:start", "Boot stopped sandboxes again."),
    "resize": ("stoker.cli.sandboxes:resize", "Give a sandbox a larger disk."),
    "freeze": ("stoker.cli.sandboxes:freeze", "Stop the CPUs of sandboxes."),
    "thaw": ("stoker.cli.sandboxes:thaw", "Let the CPUs go on."),
    "pause": ("stoker.cli.sandboxes:pause", "Put sandboxes away, memory and all."),
    "fork": ("stoker.cli.sandboxes:fork", "Copy a running sandbox as it is."),
    "resume": ("stoker.cli.sandboxes:resume", "Take paused sandboxes up again."),
    "timeout": ("stoker.cli.sandboxes:timeout", "Say when a sandbox ends by itself."),
    "wait": ("stoker.cli.sandboxes:wait", "Wait for a sandbox or one of its processes."),
    "inspect": ("stoker.cli.sandboxes:inspect", "Print all that is known of sandboxes."),
    "rm": ("stoker.cli.sandboxes:rm", "Destroy sandboxes."),
    "pool": ("stoker.cli.pool:pool", "Make, list and remove pools: where disks are."),
    "snapshot": ("stoker.cli.snapshot:snapshot", "Keep what sandboxes are, and start others from it."),
    "template": ("stoker.cli.template:template", "Make names that sandboxes are created from, all set up."),
    "warm": ("stoker.cli.warm:warm", "Keep machines ready for the next creates."),
    "volume": ("stoker.cli.volume:volume", "Make, list, copy and remove volumes."),
    "events": ("stoker.cli.events:events", "Print what happens, as it happens."),
    "image": ("stoker.cli.images:image", "List, look at and remove images."),
    "kernel": ("stoker.cli.images:kernel", "List, look at and remove kernels."),
    "gc": ("stoker.cli.upkeep:gc", "Free what nothing refers to."),
    "fsck": ("stoker.cli.upkeep:fsck", "Compare the books with the host, and mend what differs."),
    "key": ("stoker.cli.key:key", "Make, list and revoke API keys."),
    "daemon": ("stoker.cli.daemon:daemon", "Look after the daemon."),
    "serve": ("stoker.cli.serve:serve", "Run the daemon in the foreground."),
    "doctor": ("stoker.cli.doctor:doctor", "Say what this host can do, and how to get the rest."),
    "bench": ("stoker.cli.bench:bench", "Measure; every figure of the README comes from here."),
    "completion": ("stoker.cli.completion:completion", "Print a shell's completion script."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported on use."""

    def __init__(self, *args: Any, table: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(word, text) for word, (_, text) in self.table.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.table and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.table, 1)
            raise click.UsageError(f"there is no command {args[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""), ctx)
        return super().resolve_command(ctx, args)


def tree() -> click.Group:
    """The whole command line."""
    group = LazyGroup(
        "stoker",
        table=COMMANDS,
        help="MicroVMs for Linux people: one command boots a real virtual machine and runs a command in it.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        no_args_is_help=True,
    )
    group.params.append(click.Option(["--version", "-V"], is_flag=True, help="Print the version."))
    return group


def _usage(error: click.ClickException) -> int:
    """A wrong word on the command line, in one line."""
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"{error.ctx.command_path} --help"
    report_line(error.format_message().rstrip("."), "bad_usage", hint)
    return EXIT_FAILED


def invoke(words: Sequence[str]) -> int:
    """Runs a command line and turns every end into an exit code; only ``STOKER_DEBUG=1`` lets a traceback through."""
    try:
        result = tree().main(list(words), prog_name="stoker", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message())
        return EXIT_FAILED
    except click.ClickException as e:
        return _usage(e)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except StokerError as e:
        if os.environ.get("STOKER_DEBUG"):
            raise
        report(e)
        return exit_code(e)
    except BrokenPipeError:
        # The reader of our own tables is gone; Python's last flush must not say so either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as e:
        if os.environ.get("STOKER_DEBUG"):
            raise
        report_line(f"{type(e).__name__}: {e}", "internal_error", "STOKER_DEBUG=1 shows where; please report it")
        return EXIT_FAILED
