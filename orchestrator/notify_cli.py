"""`kdcloud notify`: who is told how a run goes, and does it arrive?"""

from __future__ import annotations

import os

import click

from orchestrator.errors import UsageError


@click.command(short_help="Who hears by webhook or mail how a run goes; --test tries it.")
@click.option("--test", "tries", is_flag=True, help="Send a word to each address now.")
def notify(tries: bool) -> None:
    """Who is told at 50, 80 and 95 % of the cap, of lost machines and of the end; --test tries it.

    Addresses stand in config.yaml (notify: [...]) or in KDCLOUD_NOTIFY; docs/notify.md shows some.

    \b
    kdcloud notify
    kdcloud notify --test
    """
    from orchestrator.config import Home, load_config
    from orchestrator.notify import Sender, addresses, trial

    home = Home.from_env()
    urls = addresses(load_config(home).notify, os.environ)
    if not urls:
        hint = f"write `notify: [ADDRESS]` into {home.config}; see docs/notify.md"
        if tries:
            raise UsageError("nobody is told yet", hint=hint)
        click.echo(f"nobody is told yet: {hint}")
        return
    sender = Sender(urls, lambda text: None)
    if tries:
        sender.send(trial())
        sender.close()
    for name, trouble in sender.outcomes().items():
        click.echo(trouble or (f"{name} took it" if tries else name))
    failed = [trouble for trouble in sender.outcomes().values() if trouble]
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(urls)} did not take it",
            hint="is the address right, and does its server answer from here? then try again",
        )
