"""``noid completion``: the script that makes a shell ask noid what a word could become."""

from __future__ import annotations

import sys

import click

from noid.cli.options import command
from noid.cli.output import show
from noid.cli.start import COMPLETING

INSTALL = {
    "bash": (
        'Put this into ~/.bashrc: eval "$(noid completion bash)"',
        "Or, for a shell that starts faster: noid completion bash > ~/.local/share/bash-completion/completions/noid",
    ),
    "zsh": (
        'Put this into ~/.zshrc, after compinit: eval "$(noid completion zsh)"',
        'Or, for a shell that starts faster: noid completion zsh > "${fpath[1]}/_noid"',
    ),
    "fish": ("Run once: noid completion fish > ~/.config/fish/completions/noid.fish",),
}


@command(asks=False, examples='eval "$(noid completion bash)"\nnoid completion fish')
@click.argument("shell", type=click.Choice(list(INSTALL)))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options, and the names of VMs, checkpoints and servers.

    How to install it is said in its first lines.
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None  # noqa: S101  # click knows these three
    made = completer(click.Command("noid"), {}, "noid", COMPLETING)
    script = made.source_template % made.source_vars()  # not source(), which starts a bash to see how old it is
    first, _, rest = script.partition("\n")
    hints = "".join(f"# {line}\n" for line in INSTALL[shell])
    text = f"{first}\n{hints}{rest}" if first.startswith("#") else f"{hints}{script}"  # zsh wants its line first
    show({"shell": shell, "script": text}, text.rstrip("\n"), brief=text.rstrip("\n"))
    if sys.stdout.isatty():
        click.echo("\n".join(INSTALL[shell]), err=True)
