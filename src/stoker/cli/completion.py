"""``stoker completion SHELL``: what makes the shell complete words, options and the names of sandboxes."""

from __future__ import annotations

import click

__all__ = ["completion"]

VARIABLE = "_STOKER_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  source <(stoker completion bash)     in ~/.bashrc
    zsh:   source <(stoker completion zsh)      in ~/.zshrc, behind compinit
    fish:  stoker completion fish > ~/.config/fish/completions/stoker.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(click.get_current_context().find_root().command, {}, "stoker", VARIABLE)
    # Not complete.source(): for bash that starts one to ask its version.
    click.echo(complete.source_template % complete.source_vars())
