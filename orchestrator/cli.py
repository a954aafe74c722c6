"""The command line: parses, calls one function, prints. stdout is data, stderr is talk.

Only here do errors become exit codes.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from orchestrator import __version__, completion
from orchestrator.errors import BudgetExceeded, DrillFailed, KdcloudError, TeardownUnconfirmed, UsageError
from orchestrator.labels_cli import labels
from orchestrator.notify_cli import notify
from orchestrator.offers_cli import offers
from orchestrator.plain import json_text, printable
from orchestrator.try_cli import try_

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.config import Config
    from orchestrator.drill import Report
    from orchestrator.ledger import Ledger, Run
    from orchestrator.plan import Plan
    from orchestrator.planner import Planner
    from orchestrator.provision import Provisioner
    from orchestrator.reap import Reaped
    from orchestrator.reap_watch import Wish
    from orchestrator.recipe import Recipe
    from orchestrator.runner import Outcome
    from orchestrator.session import Session

    DrillReport = Report

EXIT_CODES = {"done": 0, "cap": 3, "no_capacity": 4, "failed": 5, "deadline": 5, "unconfirmed": 6, "stopped": 130}
F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = {
    "Begin": ["init", "doctor", "completion"],
    "Plan": ["plan", "estimate", "offers", "recipe-schema"],
    "Run": ["run", "dev", "attach", "status", "logs", "down", "adopt"],
    "Look": ["report", "compare", "try", "artifacts", "labels", "tensorboard"],
    "Safety": ["budget", "notify", "reap", "drill"],
}


class Sections(click.Group):
    """Commands in the order a person needs them, in groups; the examples of each stand at the end of its help."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(cmd, name)
        for one in (cmd, *(cmd.commands.values() if isinstance(cmd, click.Group) else ())):
            _examples_last(one)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in names])


def _examples_last(command: click.Command) -> None:
    """Moves the paragraphs of a help text that are examples below its options."""
    paragraphs = cleandoc(command.help or "").split("\n\n")
    examples = [text for text in paragraphs if text.startswith("\b\n") and "kdcloud " in text.splitlines()[1]]
    if examples:
        command.help = "\n\n".join(text for text in paragraphs if text not in examples)
        lines = "\n".join(text.removeprefix("\b\n") for text in examples).splitlines()
        command.epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kdcloud")
def kdcloud() -> None:
    """Distil a reasoning model on rented GPUs, under a hard cap.

    \b
    kdcloud init                   a few questions, and a recipe of your own
    kdcloud plan quickstart        what it needs and costs, before a cent is spent
    kdcloud run quickstart         does it; on your own CPU, in minutes

    The tab key completes commands, recipes and runs: `kdcloud completion --help`. Examples: `kdcloud COMMAND --help`.

    Exit codes: 0 done, 1 a bug, 2 wrong recipe or usage, 3 the cap (or the plan does not fit it), 4 no machine
    fits or can be had, 5 a stage failed or missed its deadline, 6 a teardown is not confirmed, 7 the run belongs to
    another client, 130 stopped by you.
    """


kdcloud.add_command(labels)
kdcloud.add_command(offers)
kdcloud.add_command(notify)
kdcloud.add_command(try_)
kdcloud.add_command(completion.completion)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(function)


def money_options(function: F) -> F:
    function = click.option(
        "--infra", metavar="WHERE", help="local, slurm/CLUSTER, or clouds like runpod,aws; overrides the recipe's."
    )(function)
    function = click.option("--deadline", metavar="TIME", help="Everything done within, like 8h.")(function)
    return click.option("--budget", metavar="AMOUNT", help="The hard cap, like 50CNY or $7; overrides the recipe's.")(
        function
    )


@kdcloud.command(short_help="A few questions, then a recipe in which every key is explained.")
@click.argument("file", type=click.Path(dir_okay=False), default="recipe.yaml", metavar="[FILE]")
@click.option(
    "--template",
    metavar="NAME",
    help="Write this one as it is and ask nothing ('list' shows them).",
    shell_complete=completion.templates,
)
@click.option("--teacher", metavar="MODEL", help="owner/name, a folder, api, or tiny: made here, on a CPU.")
@click.option("--student", metavar="MODEL", help="A smaller model with the teacher's tokenizer.")
@click.option("--prompts", metavar="FILE", help='Lines of {"input": ..., "answer": ...}, or sample.')
@click.option("--infra", metavar="WHERE", help="local, slurm/CLUSTER, or clouds with commas.")
@click.option("--budget", metavar="AMOUNT", help="The hard cap, like 50CNY or $7.")
@click.option("--yes", "-y", is_flag=True, help="Take the default of every question that no option answers.")
@click.option("--force", is_flag=True, help="Replace FILE, and data beside it, without asking.")
def init(file: str, template: str | None, yes: bool, force: bool, **given: str | None) -> None:
    """Ask up to five questions and write a recipe in which every key is explained; ends with what it would cost.

    \b
    kdcloud init
    kdcloud init --yes --prompts mine.jsonl --budget 30CNY
    kdcloud init first.yaml --template quickstart

    Exit codes as of `kdcloud plan`: the recipe is written all the same when it does not fit.
    """
    from pathlib import Path

    from orchestrator.init_cli import begin, list_templates, next_steps, summary, wrapped

    if template == "list":
        list_templates()
        return
    path = begin(Path(file), template, given, home=_home()[0], yes=yes, force=force)
    made = _planned(str(path), None, None, None)[1]
    _talk(wrapped(summary(made)))
    if not made.fits:
        raise _too_dear(made)
    _talk(next_steps(made, path))


@kdcloud.command(short_help="Is all there that a run needs? With RUN: what went wrong?")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option(
    "--recipe",
    metavar="FILE",
    help="Look at what this recipe needs: its bucket, infras, keys, quotas.",
    shell_complete=completion.recipes,
)
@click.option("--offline", is_flag=True, help="Ask nobody: only what this computer tells.")
@json_option
def doctor(run_id: str | None, recipe: str | None, offline: bool, as_json: bool) -> None:
    """Is everything there that a run needs? Each thing with its cure; with RUN, what went wrong in that run.

    \b
    kdcloud doctor
    kdcloud doctor --recipe recipe.yaml
    kdcloud doctor last

    Exit codes: 0 nothing is bad (what is only to look at stops no run), 2 something is.
    """
    if run_id is not None:
        _diagnose(run_id, as_json)
        return
    from orchestrator.doctor import is_well, render, to_json
    from orchestrator.doctor_look import examine

    checks = examine(recipe, _plan_for_doctor, offline=offline)
    if as_json:
        _print_json(to_json(checks))
    else:
        render(checks, _console())
    if not is_well(checks):
        sys.exit(UsageError.exit_code)


@kdcloud.command(short_help="What every stage needs and costs, against the cap.")
@click.argument("recipe", shell_complete=completion.recipes)
@money_options
@click.option("--frontier", is_flag=True, help="Also what less time would cost: plans that none beats in both.")
@click.option("--explain", metavar="STAGE", multiple=True, help="Also why each other card lost there. Repeatable.")
@click.option(
    "--what-if", metavar="CHANGE", multiple=True, help="Also the plan with gpu=RTX3090, spot=yes and so on. Repeatable."
)
@json_option
def plan(
    recipe: str, budget: str | None, deadline: str | None, infra: str | None, frontier: bool, explain: tuple[str, ...],
    what_if: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """What every stage needs and costs: memory, hours, machine, price; the total against the cap.

    \b
    kdcloud plan quickstart
    kdcloud plan recipe.yaml --deadline 8h --frontier --explain train
    kdcloud plan recipe.yaml --what-if "gpu=RTX3090 spot=yes"
    """
    planner, made = _planned(recipe, budget, deadline, infra)[:2]
    if frontier or explain or what_if:
        _other_looks(planner, made, frontier, explain, what_if, as_json)
    elif as_json:
        from orchestrator.plan import plan_to_json

        _print_json(plan_to_json(made))
    else:
        from orchestrator.plan import render_plan

        render_plan(made, _console())
    _warn_of_the_month(made.cap_micros)
    if not made.fits:
        raise _too_dear(made)


@kdcloud.command(short_help="Plan, ask, rent, work and tear down; never over the cap.")
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@money_options
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with a run that was stopped, killed or out of money ('last': the newest).",
    shell_complete=completion.runs,
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask before money is spent.")
@click.option("--detach", "-d", is_flag=True, help="Leave it to a process that outlives this terminal.")
@click.option("--smoke", is_flag=True, help="Every stage with 10 samples, under a small cap of its own: try the way.")
def run(
    recipe: str | None,
    budget: str | None,
    deadline: str | None,
    infra: str | None,
    resume: str | None,
    yes: bool,
    detach: bool,
    smoke: bool,
) -> None:
    """Plan, ask, then rent, label, train, evaluate and tear down, never over the cap.

    \b
    kdcloud run quickstart
    kdcloud run recipe.yaml --budget 50CNY --yes --detach
    kdcloud run --resume last --budget 60CNY
    """
    if (recipe is None) == (resume is None):
        raise UsageError("run needs a recipe, or --resume RUN", hint="try `kdcloud run quickstart`")
    if resume is not None and infra is not None:
        raise UsageError("a run goes on where its plan was approved for", hint="leave --infra out, or start a new run")
    if resume is not None and smoke:
        raise UsageError("a run goes on as it was begun", hint="leave --smoke out, or give a recipe")
    with _ledger() as ledger:
        if resume is not None:
            _resume(ledger, resume, budget, deadline, detach)
        else:
            assert recipe is not None
            _start(ledger, recipe, budget, deadline, infra, yes, detach, smoke)


@kdcloud.command(short_help="JupyterLab and TensorBoard on a stage's machine, under a cap.")
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@click.option("--stage", metavar="NAME", help="In whose place (default: the first that trains).")
@money_options
@click.option("--idle", metavar="TIME", help="Ended when nothing computes on it for so long (15min).")
@click.option(
    "--run", "run_id", metavar="RUN", help="Take inputs and the student from this run (default: the newest).",
    shell_complete=completion.runs,
)
@click.option("--chat", is_flag=True, help="Also Open WebUI before the student of --run, or the stage's own model.")
@click.option(
    "--resume", metavar="BOX", help="Go back to a box whose client is gone, or open it again.",
    shell_complete=completion.runs,
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask before money is spent.")
def dev(
    recipe: str | None, stage: str | None, budget: str | None, deadline: str | None, infra: str | None,
    idle: str | None, run_id: str | None, chat: bool, resume: str | None, yes: bool,
) -> None:  # fmt: skip
    """A box to work on in a stage's place: JupyterLab and TensorBoard on its machine, reached over SSH, under a cap.

    \b
    kdcloud dev recipe.yaml --stage train
    kdcloud dev recipe.yaml --deadline 2h --budget 20CNY --idle 30min
    kdcloud dev recipe.yaml --chat --run last

    Addresses are printed on stdout. Ctrl-C, `kdcloud down`, an hour (--deadline), the cap, and 15 minutes in which
    nothing computes end it; files below work/ are saved, and are there again in the next box.
    """
    if (recipe is None) == (resume is None):
        raise UsageError("dev needs a recipe, or --resume BOX", hint="try `kdcloud dev quickstart --stage train`")
    with _ledger() as ledger:
        if recipe is None:
            _dev_resume(ledger, str(resume), budget, deadline)
        else:
            _dev(ledger, recipe, stage, budget, deadline, infra, idle, run_id, chat, yes)


@kdcloud.command(short_help="Watch a run that another terminal drives.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
def attach(run_id: str | None) -> None:
    """Watch a run that another client drives, and end as it ends; Ctrl-C leaves it running.

    \b
    kdcloud attach
    kdcloud attach last
    """
    from orchestrator.session import newest
    from orchestrator.watching import watch

    with _ledger() as ledger:
        name = newest(ledger, run_id)
        outcome = watch(name, ledger=ledger, say=_talk, until_left=True)
        if outcome is not None:
            _finish(ledger, name, outcome)


@kdcloud.command(short_help="Runs, their money, and every machine that may still bill.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option("--watch", "-w", "watches", is_flag=True, help="Keep looking at one run (the newest) to its end.")
@json_option
def status(run_id: str | None, watches: bool, as_json: bool) -> None:
    """Runs, their state and money, and every machine that may still bill.

    \b
    kdcloud status
    kdcloud status --watch
    kdcloud status --json
    """
    from orchestrator.session import newest
    from orchestrator.status import build_status, render_status
    from orchestrator.watching import watch

    if watches and as_json:
        raise UsageError("--watch is for people, --json is one document", hint="leave one of them out")
    with _ledger() as ledger:
        runs = [newest(ledger, run_id)] if run_id or watches else ledger.runs()
        if watches and watch(runs[0], ledger=ledger, say=_talk, until_left=False) is None:
            return
        document = build_status([ledger.run(name) for name in runs], _provider_of)
    if as_json:
        _print_json(document)
    else:
        render_status(document, _console())


@kdcloud.command(short_help="What a stage printed; -f goes on until the run has ended.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option("--follow", "-f", is_flag=True, help="Go on as lines come, from stage to stage, until the run has ended.")
@click.option("--stage", help="Only this stage (default: the newest that has a log).")
@click.option("--lines", "-n", default=0, metavar="N", help="Only the last N lines of what is there.")
def logs(run_id: str | None, follow: bool, stage: str | None, lines: int) -> None:
    """What a stage printed, or prints.

    \b
    kdcloud logs --stage train -n 50
    kdcloud logs -f
    """
    from orchestrator.follow import show_logs
    from orchestrator.session import newest

    with _ledger() as ledger:
        name = newest(ledger, run_id)
        provider = _provider_of(ledger.run(name)) if follow else None
        show_logs(
            name, ledger=ledger, stage=stage, last=lines, follow=follow, provider=provider, out=click.echo, say=_talk
        )


@kdcloud.command(short_help="The curves of a run in TensorBoard, while they grow.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option("--port", type=click.IntRange(1, 65535), help="Of this machine (default: 6006, or another free one).")
def tensorboard(run_id: str | None, port: int | None) -> None:
    """The curves of a run in TensorBoard, on this machine only, while they grow; Ctrl-C ends it.

    \b
    kdcloud tensorboard
    kdcloud tensorboard last --port 7007
    """
    from orchestrator.session import newest
    from orchestrator.tensorboard import check_installed, show

    check_installed()
    with _ledger() as ledger:
        show(newest(ledger, run_id), ledger=ledger, home=_home()[0], port=port, say=_talk)


@kdcloud.command(short_help="End every machine of a run, now; results stay.")
@click.argument("run_id", metavar="RUN", required=False, shell_complete=completion.runs)
@click.option(
    "--all", "every", is_flag=True, help="Every run that may still bill, and machines the ledger does not know."
)
def down(run_id: str | None, every: bool) -> None:
    """End every machine of a run, now; checkpoints and results stay in the bucket.

    \b
    kdcloud down last
    kdcloud down --all
    """
    from orchestrator.session import end_local_strangers, end_run, newest, state_of

    if (run_id is None) != every:
        raise UsageError("down needs a RUN, or --all", hint="`kdcloud status` lists them")
    def may_bill(name: str) -> bool:
        known = ledger.run(name)
        return bool(known.api_open_micros) or any(m.open_micros or m.state != "GONE" for m in known.machines)

    home, _ = _home()
    outcomes = []
    with _ledger() as ledger:
        names = [name for name in ledger.runs() if may_bill(name)] if every else [newest(ledger, run_id)]
        at_work = [name for name in names if every or may_bill(name) or state_of(ledger.run(name)) == "running"]
        for name in names:
            outcomes.append((name, end_run(name, ledger=ledger, home=home, say=_say)))
        strangers = end_local_strangers(ledger, home, say=_say) if every else 0
        for name, outcome in outcomes:
            if outcome.state == "unconfirmed":
                _finish(ledger, name, outcome)
    _talk(
        f"{len(at_work) + strangers} ended; nothing of {'yours' if every else 'it'} is running"
        if at_work or strangers
        else "nothing was running" if every else "nothing of it was running"
    )


@kdcloud.command(short_help="Take over a run of another computer, from its bucket.")
@click.argument("url", metavar="BUCKET/RUN")
def adopt(url: str) -> None:
    """Take a run that another computer began into this one's ledger, from its bucket; rents and ends nothing.

    Every command that takes a RUN takes such an address too: `kdcloud run --resume s3://...` goes on at once.

    \b
    kdcloud adopt s3://my-bucket/kd/quickstart-k3x9ab
    """
    from orchestrator.session import newest, state_of

    if ":" not in url:
        raise UsageError(f"{url!r} is not a place in a bucket", hint="write file:/some/folder/RUN or s3://bucket/RUN")
    with _ledger() as ledger:
        name = newest(ledger, url)
        known = ledger.run(name)
        click.echo(name)
    _talk(
        f"{state_of(known)}; {len(known.done)} stages done, {len(known.live)} machines may still bill; "
        f"go on with `kdcloud run --resume {name}`, or end it with `kdcloud down {name}`"
    )


@kdcloud.command(short_help="What came out: cost and quality; --html as one page.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write it as one page to FILE.")
@click.option("--open", "opens", is_flag=True, help="With --html: show the page in a browser.")
@json_option
def report(run_id: str | None, html: str | None, opens: bool, as_json: bool) -> None:
    """What came out: money against plan and cap, predicted against actual, student against teacher.

    \b
    kdcloud report
    kdcloud report --html report.html --open
    kdcloud report --json
    """
    from orchestrator.session import newest

    _needs_html(html, opens)
    with _ledger() as ledger:
        _report(ledger, newest(ledger, run_id), as_json, html=html, opens=opens)


@kdcloud.command(short_help="Runs beside each other: cost, accuracy, settings.")
@click.argument("run_ids", metavar="RUN RUN...", nargs=-1, required=True, shell_complete=completion.runs)
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write it as one page to FILE.")
@click.option("--open", "opens", is_flag=True, help="With --html: show the page in a browser.")
@json_option
def compare(run_ids: tuple[str, ...], html: str | None, opens: bool, as_json: bool) -> None:
    """Runs beside each other: cost against accuracy, and the settings in which they differ.

    \b
    kdcloud compare a1b2c3 last
    kdcloud compare a1b2c3 last --html compare.html --open
    """
    _needs_html(html, opens)
    with _ledger() as ledger:
        _compare(ledger, run_ids, as_json, html=html, opens=opens)


@kdcloud.command(short_help="What a run left: list, fetch or delete it.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.option("--stage", help="Only this stage.")
@click.option("--fetch", "dest", metavar="DIR", help="Bring what is committed to DIR, checked; again goes on.")
@click.option("--prune", is_flag=True, help="Delete what old runs (or RUN) left; only shows it without --yes.")
@click.option("--older-than", default="30d", metavar="TIME", help="With --prune: runs that ended before (30d).")
@click.option(
    "--what",
    type=click.Choice(["checkpoints", "labels", "everything"]),
    default="checkpoints",
    help="With --prune: checkpoints and broken uploads; labels, too; or everything but the ledger.",
)
@click.option("--push-to-hub", "repo", metavar="USER/NAME", help="Upload the exported student to the Hugging Face hub.")
@click.option("--public", is_flag=True, help="With --push-to-hub: for everybody to see; private without it.")
@click.option("--yes", "-y", is_flag=True, help="With --prune: really delete; with --push-to-hub: do not ask.")
@json_option
def artifacts(
    run_id: str | None, stage: str | None, dest: str | None, prune: bool, older_than: str, what: str, repo: str | None,
    public: bool, yes: bool, as_json: bool,
) -> None:  # fmt: skip
    """What a run left in its bucket: list it, fetch it, publish its student, or delete what old runs left.

    \b
    kdcloud artifacts last --fetch student --stage export
    kdcloud artifacts last --push-to-hub you/addition-student
    kdcloud artifacts --prune --older-than 60d
    """
    from orchestrator.session import newest

    if prune and (dest or stage or repo):
        raise UsageError(
            "--prune goes with neither --fetch nor --push-to-hub nor --stage", hint="fetch first, then prune"
        )
    if public and not repo:
        raise UsageError("--public says how --push-to-hub is to publish", hint="add --push-to-hub USER/NAME")
    if repo and dest:
        raise UsageError("--push-to-hub and --fetch are two things", hint="do one after the other")
    with _ledger() as ledger:
        if prune:
            runs = [newest(ledger, run_id)] if run_id else ledger.runs()
            _prune(ledger, runs, run_id is not None, _duration(older_than, "--older-than"), what, yes, as_json)
        elif repo:
            from orchestrator.hub_push import push_command

            push_command(ledger.run(newest(ledger, run_id)), _home()[0], repo, stage, public, yes, as_json)
        else:
            _artifacts(ledger, newest(ledger, run_id), stage, dest, as_json)


@kdcloud.command(short_help="Find forgotten machines; --yes ends them.")
@click.option("--yes", "-y", is_flag=True, help="End what is forgotten; without it nothing is touched.")
@click.option("--orphans", is_flag=True, help="Also end machines of yours that no run here knows.")
@click.option("--older-than", metavar="TIME", help="Only machines older than this, like 2h.")
@click.option("--watch", metavar="TIME", help="Look again every so often, like 10min, until stopped.")
@click.option("--infra", metavar="WHERE", multiple=True, help="Look there too: aws (EC2 itself), slurm. Repeatable.")
@json_option
def reap(
    yes: bool, orphans: bool, older_than: str | None, watch: str | None, infra: tuple[str, ...], as_json: bool
) -> None:
    """Find forgotten machines, and end them with --yes; a healthy run's or somebody else's are never touched.

    \b
    kdcloud reap
    kdcloud reap --yes --watch 10min
    kdcloud reap --infra aws
    """
    from datetime import timedelta

    from orchestrator.reap_watch import Wish

    older = timedelta(seconds=_duration(older_than, "--older-than")) if older_than else None
    every_s = _duration(watch, "--watch") if watch else None
    wish = Wish(yes, orphans, older, infra)
    if every_s is None:
        _reap_once(wish, as_json)
    else:
        _reap_for_ever(wish, every_s, as_json)


@kdcloud.command(short_help="Break made-up runs: does the cap hold? Rents nothing.")
@click.option("--schedules", default=1000, show_default=True, type=click.IntRange(1), help="So many runs are broken.")
@click.option("--seed", type=click.IntRange(0), help="The same seed plays the same (default: by chance).")
@click.option(
    "--without",
    metavar="GUARD",
    help="Take one guard away: the drill must fail ('list' names them).",
    shell_complete=completion.guards,
)
@json_option
def drill(schedules: int, seed: int | None, without: str | None, as_json: bool) -> None:
    """Fire drill: does the cap hold whatever breaks? Rents nothing, takes minutes at most; nothing in it is real.

    \b
    kdcloud drill --schedules 10000
    kdcloud drill --schedules 1 --seed 1234
    kdcloud drill --without latencies
    """
    import secrets

    from orchestrator.drill_guards import GUARDS

    if without == "list":
        for name, guard in GUARDS.items():
            click.echo(f"{name:<18} {guard.says}")
        return
    if without is not None and without not in GUARDS:
        raise UsageError(f"no guard {without!r}", hint=f"known: {', '.join(GUARDS)}")
    result = _drill(schedules, secrets.randbelow(2**32) if seed is None else seed, without)
    if as_json:
        _print_json(result.to_json())
    else:
        from orchestrator.drill import render_drill

        render_drill(result, _console())
    if result.failing_seeds:
        taken = f" --without {without}" if without else ""
        raise DrillFailed(
            f"{len(result.failing_seeds)} of {result.schedules} schedules broke the promise"
            + (f", as some must without {without}" if without else ""),
            hint=f"play one alone: kdcloud drill{taken} --schedules 1 --seed {result.failing_seeds[0]}",
        )


@kdcloud.command(short_help="What this month cost; --month caps all its runs.")
@click.option("--month", metavar="AMOUNT", help="Cap for all runs of a calendar month together, like 200CNY; or none.")
@json_option
def budget(month: str | None, as_json: bool) -> None:
    """What all runs of this month spent, and the cap that holds for them together; --month sets it.

    \b
    kdcloud budget
    kdcloud budget --month 200CNY
    kdcloud budget --month none
    """
    from datetime import UTC, datetime

    from orchestrator.budget import build_budget, describe
    from orchestrator.config import set_monthly_cap

    if month is not None:
        set_monthly_cap(_home()[0], None if month.lower() == "none" else _amount(month, "--month"))
    _, config = _home()
    with _ledger() as ledger:
        document = build_budget(ledger.month(datetime.now(UTC)), config)
    if as_json:
        _print_json(document)
    else:
        click.echo(describe(document, config))


@kdcloud.command("estimate", short_help="Memory and time of runs that others measured.")
@click.argument("files", metavar="CASES.jsonl", nargs=-1, required=True)
@click.option("--score", is_flag=True, help="How far off, against what the cases measured, beside two public rules.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line a case; with --score one document.")
def estimate_command(files: tuple[str, ...], score: bool, as_json: bool) -> None:
    """Memory and time of training and generation cases, one JSON object a line.

    \b
    kdcloud estimate cases.jsonl --json
    kdcloud estimate cases.jsonl --score
    """
    from orchestrator import estimate
    from orchestrator.cases import read_cases

    cases = [case for file in files for case in read_cases(file)]
    for case in cases:
        if case.unused:
            _talk(f"{case.id}: not used: {', '.join(case.unused)}")
    if score:
        rows = estimate.rows_of(cases)
        if as_json:
            _print_json(estimate.score_json(rows))
        else:
            estimate.render_scores(rows, _console())
        return
    found = [estimate.estimate(case) for case in cases]
    if as_json:
        for each in found:
            click.echo(json_text(estimate.as_json(each)))
    else:
        estimate.render(found, _console())


@kdcloud.command("recipe-schema", short_help="JSON schema of a recipe, for editors.")
def recipe_schema_command() -> None:
    """JSON schema of a recipe, for editors that complete and check.

    \b
    kdcloud recipe-schema > recipe.schema.json
    """
    from orchestrator.recipe import recipe_schema

    _print_json(recipe_schema())


# -- what the commands share -------------------------------------------------------------------------------------------


def _start(
    ledger: Ledger,
    recipe: str,
    budget: str | None,
    deadline: str | None,
    infra: str | None,
    yes: bool,
    detach: bool,
    smoke: bool,
) -> None:
    from orchestrator.plan import render_plan
    from orchestrator.session import infra_of, local_price, provider_for, start_run

    made, provider, loaded = _plan(recipe, budget, deadline, infra, live=True, smoke=smoke)
    render_plan(made, _console(stderr=True))
    _warn_of_the_month(made.cap_micros)
    if not made.fits:
        raise _too_dear(made)
    if not yes:
        _ask("Run it?")
    home, config = _home()
    where = infra_of(made)
    if provider is None:
        provider = provider_for(
            where, home, local_price_micros=local_price(made), allow_account_key=loaded.allow_account_key
        )
    session = start_run(
        made,
        ledger=ledger,
        home=home,
        config=config,
        provider=provider,
        recipe_text=loaded.text,
        allow_account_key=loaded.allow_account_key,
        smoke=smoke,
        say=_say,
    )
    _talk(f"run {session.run_id}, artefacts in {session.bucket.url}")
    if detach:
        session.lease.release()
        _leave_to_itself(ledger, session.run_id)
    else:
        _go(session)


def _resume(ledger: Ledger, resume: str, budget: str | None, deadline: str | None, detach: bool) -> None:
    from orchestrator import money
    from orchestrator.plan import plan_from_dict
    from orchestrator.session import newest, resume_run

    home, _ = _home()
    name = newest(ledger, resume)
    known = ledger.run(name)
    made = plan_from_dict(known.data["plan"])
    if made.stages[0].kind == "box":
        raise UsageError(f"{name} is a box", hint=f"`kdcloud dev --resume {name}` opens it again")
    if len(known.done) == len(made.stages) and not known.live:
        _talk(f"{name} is done already")
        _report(ledger, name, as_json=False)
        return
    cap = money.cap_micros(_amount(budget), made.rate) if budget else None
    seconds = _duration(deadline) if deadline else None
    if detach:
        given = {"--budget": budget, "--deadline": deadline}
        _leave_to_itself(ledger, name, *(word for item in given.items() if item[1] for word in item if word))
        return
    session = resume_run(name, ledger=ledger, home=home, cap_micros=cap, deadline_s=seconds)
    _warn_of_the_month((cap or known.cap_micros) - known.spent_micros)
    _talk(f"going on with {name}: {len(known.done)} of {len(made.stages)} stages are done")
    _go(session)


def _dev(
    ledger: Ledger, recipe: str, stage: str | None, budget: str | None, deadline: str | None, infra: str | None,
    idle: str | None, run_id: str | None, chat: bool, yes: bool,
) -> None:  # fmt: skip
    from orchestrator import dev as desk
    from orchestrator import money
    from orchestrator.session import infra_of, local_price, newest, provider_for, start_run
    from tasks.contract import inputs_of

    whole, provider, loaded = _plan(recipe, None, None, infra, live=True)
    chosen = desk.chosen_stage(whole, stage)
    given = ledger.run(newest(ledger, run_id)) if run_id else None
    settings = desk.box_settings(chosen, given, chat=chat)
    runs = [ledger.run(name) for name in ledger.runs()]
    inputs = desk.find_inputs(runs, whole.name, chosen.name, inputs_of(settings), given)
    made = desk.box_plan(
        whole, chosen, desk.with_before(settings, inputs),
        cap_micros=money.cap_micros(_amount(budget), whole.rate) if budget else None,
        deadline_s=_duration(deadline) if deadline else desk.DEADLINE_S,
        idle_s=_duration(idle, "--idle") if idle else desk.IDLE_S,
    )  # fmt: skip
    desk.check_here(made)
    for line in desk.words_of(made, inputs.words()):
        _talk(line)
    for name in desk.still_open(runs, whole.name, chosen.name):
        _talk(f"  {name} may still be open, a box of this stage: `kdcloud dev --resume {name}` goes there instead")
    _warn_of_the_month(made.cap_micros)
    if not yes:
        _ask("Open it?")
    home, config = _home()
    if provider is None:
        provider = provider_for(
            infra_of(made), home, local_price_micros=local_price(made), allow_account_key=loaded.allow_account_key
        )
    session = start_run(
        made, ledger=ledger, home=home, config=config, provider=provider, recipe_text=loaded.text,
        allow_account_key=loaded.allow_account_key, say=_say,
    )  # fmt: skip
    _talk(f"run {session.run_id}; `kdcloud down {session.run_id}` ends it from elsewhere")
    try:
        desk.lay_in(inputs.pieces, session, _talk)
    except BaseException:
        session.lease.release()
        raise
    _open_box(session)


def _dev_resume(ledger: Ledger, resume: str, budget: str | None, deadline: str | None) -> None:
    from orchestrator import dev as desk
    from orchestrator import money
    from orchestrator.session import newest, plan_of, resume_run

    name = newest(ledger, resume)
    known = ledger.run(name)
    made = plan_of(known)
    desk.check_resumable(known, made)
    cap = money.cap_micros(_amount(budget), made.rate) if budget else None
    seconds = _duration(deadline) if deadline else None
    _open_box(resume_run(name, ledger=ledger, home=_home()[0], cap_micros=cap, deadline_s=seconds))


def _open_box(session: Session) -> None:
    """Keeps a box open until it ends; the first Ctrl-C closes it, a second one does not wait for its files."""
    from orchestrator import dev as desk
    from orchestrator.scene import clean
    from orchestrator.signals import heard_by

    view = desk.DeskView(session.plan)
    box = desk.Desk(session, view.say, click.echo)
    for text in session.notes:
        _talk(f"note: {text}")
    with heard_by(box.close):
        outcome = box.go()
    for line in desk.last_words(session.ledger.run(session.run_id), session.plan):
        _talk(clean(line))
    if outcome.state != "done":
        _explain(clean(outcome.message), outcome.hint.replace("kdcloud run --resume", "kdcloud dev --resume"))
    sys.exit(EXIT_CODES[outcome.state])


def _leave_to_itself(ledger: Ledger, name: str, *words: str) -> None:
    """Starts a client that outlives this one; leaves with its exit code when it gave up at once."""
    from orchestrator.detached import start_client

    log = _home()[0].runs / name / "client.log"
    rc = start_client(name, words, ledger=ledger, log=log)
    if rc is not None:
        _talk("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
        sys.exit(rc)
    click.echo(name)
    _talk(f"it goes on by itself; its talk is in {log}")
    _talk(f"  kdcloud attach {name}    watch it\n  kdcloud logs {name}      what a stage printed")
    _talk(f"  kdcloud down {name}      end it")


def _go(session: Session) -> None:
    """Runs a session under a live view; the first Ctrl-C saves and tears down, and says so."""
    from orchestrator.live import note_of_run, stopping_words, view_for
    from orchestrator.signals import heard_by

    asked = 0
    view = view_for(session.plan, session.bucket.url, note=note_of_run(session.run_id))
    for text in session.notes:
        _talk(f"note: {text}")

    def stop() -> None:
        nonlocal asked
        asked += 1
        text = stopping_words(session.run_id, session.plan, asked)
        view.state, view.note = "stopping", text
        view.say("stop", None, text)

    with heard_by(stop), view:
        outcome = session.go(say=view.say, stop=lambda: asked > 0, on_turn=view.update)
    _finish(session.ledger, session.run_id, outcome)


def _finish(ledger: Ledger, name: str, outcome: Outcome) -> None:
    """Prints the report, says what may be next, and leaves with the outcome's exit code."""
    _report(ledger, name, as_json=False)
    if outcome.state == "done":
        short = name[-6:]
        _talk(f"\n  kdcloud report {short} --html report.html --open    one page to show around")
        _talk(f"  kdcloud artifacts {short} --fetch {name}    its files, checked")
    elif outcome.state == "failed":
        _talk(f"  kdcloud doctor {name}    what went wrong, and the lines of the recipe that mend it")
    sys.exit(EXIT_CODES[outcome.state])


def _report(ledger: Ledger, name: str, as_json: bool, *, html: str | None = None, opens: bool = False) -> None:
    from orchestrator.report import render_report

    known, made, document = _reported(ledger, name)
    if html is not None:
        from datetime import UTC, datetime

        from orchestrator.page import render_page
        from orchestrator.page_data import gather

        _put_page(html, render_page(gather(known, made, document, now=datetime.now(UTC))), opens=opens)
    if as_json:
        _print_json(document)
    elif html is None:
        render_report(document, made, _console())


def _reported(ledger: Ledger, name: str) -> tuple[Run, Plan, dict[str, Any]]:
    """The run, its plan, and the document of `report --json`; providers are asked where something may bill."""
    from orchestrator.report import build_report
    from orchestrator.session import live_machines, plan_of

    known = ledger.run(name)
    made = plan_of(known)
    return known, made, build_report(known, made, live_machines(known, _provider_of(known) if known.live else None))


def _compare(ledger: Ledger, names: tuple[str, ...], as_json: bool, *, html: str | None, opens: bool) -> None:
    from datetime import UTC, datetime

    from orchestrator.compare import build_compare, render_compare
    from orchestrator.session import newest

    ids = list(dict.fromkeys(newest(ledger, name) for name in names))
    if len(ids) < 2:
        raise UsageError(f"{ids[0]} alone is nothing to compare", hint="name two runs; `kdcloud status` lists them")
    runs = [(document, made) for _, made, document in (_reported(ledger, name) for name in ids)]
    document, rate = build_compare(runs), runs[0][1].rate
    if html is not None:
        from orchestrator.page import render_compare_page

        now = datetime.now(UTC).isoformat(timespec="seconds")
        _put_page(html, render_compare_page(document, rate, made_at=now, version=__version__), opens=opens)
    if as_json:
        _print_json(document)
    elif html is None:
        render_compare(document, rate, _console())


def _needs_html(html: str | None, opens: bool) -> None:
    if opens and html is None:
        raise UsageError("--open needs a page to show", hint="add --html report.html")


def _put_page(file: str, page: str, *, opens: bool) -> None:
    """Writes a page and says where it is. Raises UsageError."""
    import webbrowser
    from pathlib import Path

    from orchestrator.artifacts import human_bytes

    path = Path(file).expanduser().resolve()
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="name another file") from error
    _talk(f"{path}: {human_bytes(path.stat().st_size)}, one file, to be opened in any browser")
    if opens and not webbrowser.open(path.as_uri()):
        _talk("no browser was found here: open that file yourself")


def _other_looks(
    planner: Planner, made: Plan, frontier: bool, explain: tuple[str, ...], what_if: tuple[str, ...], as_json: bool
) -> None:
    """The plan with cost against time, what each card would be, and other plans beside it."""
    from orchestrator import plan_views as views
    from orchestrator.plan import plan_to_json, render_plan

    front = planner.frontier() if frontier else []
    looked = {name: planner.explain(name) for name in explain}
    compared = [views.compared(planner, views.parse_what_if(text)) for text in what_if]
    if as_json:
        document = plan_to_json(made)
        if frontier:
            document["frontier"] = views.frontier_to_json(front, made)
        if explain:
            document["explain"] = {name: views.explain_to_json(cards) for name, cards in looked.items()}
        if what_if:
            document["what_if"] = views.what_if_to_json(compared)
        _print_json(document)
        return
    console = _console()
    render_plan(made, console)
    if frontier:
        views.render_frontier(front, made, console)
    for name, cards in looked.items():
        views.render_explained(name, cards, made, console)
    if what_if:
        views.render_what_if(compared, made, console)


def _plan_for_doctor(recipe: str) -> tuple[Plan, bool]:
    made, _, loaded = _plan(recipe, None, None, None)
    return made, loaded.allow_account_key


def _diagnose(run_id: str, as_json: bool) -> None:
    from importlib import import_module

    from orchestrator.session import newest

    try:
        diagnosis = import_module("orchestrator.diagnosis")
    except ModuleNotFoundError as error:
        hint = f"`kdcloud report {run_id}` shows it"
        raise UsageError("this version cannot look into a run yet", hint=hint) from error
    with _ledger() as ledger:
        diagnosis.diagnose_command(ledger, newest(ledger, run_id), as_json)


def _plan(
    recipe: str, budget: str | None, deadline: str | None, infra: str | None, *, live: bool = False, smoke: bool = False
) -> tuple[Plan, Provisioner | None, Recipe]:
    """(plan, the provider whose offers it rests on or None, the recipe). Raises UsageError, NothingFits."""
    return _planned(recipe, budget, deadline, infra, live=live, smoke=smoke)[1:]


def _planned(
    recipe: str, budget: str | None, deadline: str | None, infra: str | None, *, live: bool = False, smoke: bool = False
) -> tuple[Planner, Plan, Provisioner | None, Recipe]:
    """(planner, plan, the provider whose offers it rests on or None, the recipe). Raises UsageError, NothingFits.

    `live`: machines are about to be rented, so their own provider is asked what it offers, not the dated table.
    """
    from dataclasses import replace
    from datetime import UTC, datetime

    from orchestrator import money, price_cache
    from orchestrator.market import worth_a_look
    from orchestrator.offers import offers_source
    from orchestrator.planner import Planner
    from orchestrator.recipe import load_recipe, on_infra
    from orchestrator.smoke import NOTE, cap_of, smoke_of

    home, config = _home()
    loaded = load_recipe(recipe)
    if infra is not None:
        loaded = on_infra(loaded, infra)
    if smoke:
        loaded = smoke_of(loaded)
    named = os.environ.get("KDCLOUD_PROVIDER")
    provider = _named_provider(named) if named else None
    wanted = {name for stage in loaded.stages for name in stage.infra or loaded.infra or ("any",)}
    rented = wanted - {"local"}
    if provider is None and ((live and rented) or any(name.startswith("slurm") for name in rented)):  # slurm: live only
        price = money.price_micros(loaded.local.price, config.rate) if loaded.local is not None else 0
        from orchestrator.session import provider_for  # with runner and ledger, which a plan does without

        provider = provider_for(wanted, home, local_price_micros=price, allow_account_key=loaded.allow_account_key)
    offers_for = offers_source(loaded, provider, config, price_cache.few(home.offers_cache, worth_a_look))
    seen = _calibration()

    def planner_of(cap: int | None) -> Planner:
        return Planner(
            loaded,
            config=config,
            offers_for=offers_for,
            now=datetime.now(UTC),
            cap_micros=cap,
            deadline_s=_duration(deadline) if deadline else None,
            calibration=seen,
        )

    planner = planner_of(money.cap_micros(_amount(budget), config.rate) if budget else None)
    made = planner.plan()
    if smoke:
        made = made if budget else planner_of(cap_of(made)).plan()
        made = replace(made, notes=(NOTE, *made.notes))
    return planner, made, provider, loaded


def _named_provider(name: str) -> Provisioner:
    from orchestrator.session import named_provider

    return named_provider(name)


def _calibration() -> dict[str, tuple[float, ...]]:
    """What earlier runs took, where there were any: a plan makes no ledger."""
    from orchestrator.calibration import TOLD, TOOK, ratios_of

    path = _home()[0].ledger
    if not path.exists():
        return {}
    from contextlib import closing

    from orchestrator.ledger import Ledger  # not by way of session, with the runner: a plan does without

    with closing(Ledger(path, say=_talk)) as ledger:
        return ratios_of(ledger.told(TOOK, TOLD))


def _artifacts(ledger: Ledger, name: str, stage: str | None, dest: str | None, as_json: bool) -> None:
    from pathlib import Path

    from orchestrator import artifacts as kept
    from tasks.bucket import open_bucket

    known = ledger.run(name)
    bucket = open_bucket(known.bucket)
    found = kept.look(bucket, kept.chosen_stages(known, stage))
    if dest is not None:
        folder = Path(dest).expanduser()
        with kept.bytes_bar(sum(kept.wanted(found).values()), "fetching") as moved:
            count = kept.fetch(bucket, found, folder, moved=moved)
        _talk(f"{count} files in {folder}, each as it was committed")
    if as_json:
        _print_json(kept.artifacts_to_json(known, found))
    elif dest is None:
        kept.render_artifacts(known, found, _console())


def _prune(
    ledger: Ledger, runs: list[str], named: bool, older_than_s: float, what: str, yes: bool, as_json: bool
) -> None:
    from datetime import timedelta

    from orchestrator import artifacts as kept
    from orchestrator.clock import SystemClock

    clock, much = SystemClock(), kept.What(what)
    found = kept.prunable_runs(
        ledger, runs, clock=clock, older_than=timedelta(seconds=older_than_s), named=named, what=much
    )
    for one in found if yes else ():
        if one.keys:
            kept.prune(ledger, one, clock=clock, what=much)
    if as_json:
        _print_json(kept.prunable_to_json(found, much, deleted=yes))
    else:
        kept.render_prunable(found, much, _home()[1], _console(), deleted=yes)


def _too_dear(made: Plan) -> BudgetExceeded:
    from orchestrator.money import both

    return BudgetExceeded(
        f"the plan needs {both(made.needed_micros, made.rate, made.currency)} with its reserves, the cap is "
        f"{both(made.cap_micros, made.rate, made.currency)}; nothing was started",
        hint=("allow more time (--deadline; --frontier shows what each costs), or " if made.deadline_s else "")
        + "raise --budget, take fewer samples, or choose a smaller student",
    )


def _reap_once(wish: Wish, as_json: bool) -> None:
    """One look, printed. Raises TeardownUnconfirmed when something may still bill."""
    from orchestrator.clock import SystemClock
    from orchestrator.reap_watch import document, lines_of, look

    clock = SystemClock()
    home, config = _home()
    result = look(wish, home, config, clock, say=_talk, stop=lambda: False)
    if as_json:
        _print_json(document(result, clock.mark().wall))
    else:
        for line in lines_of(result):
            click.echo(line, err=line.startswith("no answer"))
        click.echo(_reaped(result, wish.do_end, config))
    _all_clear(result)


def _reap_for_ever(wish: Wish, every_s: float, as_json: bool) -> None:
    """Looks again and again until SIGTERM or Ctrl-C; a line of JSON a look, or what is new in words."""
    from dataclasses import replace

    from orchestrator.clock import SystemClock
    from orchestrator.reap_watch import News, document, look, until_told, watch

    clock, news, config = SystemClock(), News(), _home()[1]

    def one_look() -> Reaped:
        nonlocal config
        home, config = _home()
        return look(wish, home, config, clock, say=_talk, stop=told.is_set)

    def tell(result: Reaped) -> None:
        if as_json:
            click.echo(json_text(document(result, clock.mark().wall)))
            return
        for line in news.of(result):
            click.echo(line, err=line.startswith("no answer"))
        if result.ended:
            click.echo(_reaped(result, wish.do_end, config))

    with until_told() as told:
        last = watch(one_look, every_s=every_s, wait=told.wait, on_round=tell)
    _all_clear(replace(last, unanswered=()))  # who did not answer was said; the next service looks again


def _reaped(result: Reaped, do_end: bool, config: Config) -> str:
    """The sum of a look, in one sentence."""
    from orchestrator import money

    forgotten = [f for f in result.findings if f.action == "end"]
    if not result.findings:
        if result.asked == ("local",) and not result.unanswered:
            return "no machine of kdcloud on this computer; nothing was rented from here: no cloud was asked"
        return "no machine of kdcloud was found" if result.unanswered else "no machine of kdcloud anywhere"
    if not do_end:
        return f"{len(forgotten)} forgotten; `kdcloud reap --yes` ends them" if forgotten else "nothing is forgotten"
    saved = money.both(result.saved_micros_per_hour, config.rate, config.currency)
    more = f", and what {len(result.unpriced)} of them cost (not found)" if result.unpriced else ""
    runs = sorted({result.runs[name] for name in result.ended if name in result.runs})
    settle = "".join(f"\n`kdcloud down {run}` settles what it cost" for run in runs)
    return f"ended {len(result.ended)}, which saves {saved} an hour{more}{settle}"


def _all_clear(result: Reaped) -> None:
    """Raises TeardownUnconfirmed unless every place answered and everything that was to end has ended."""
    if result.left:
        raise TeardownUnconfirmed(
            f"still there: {', '.join(result.left)}",
            hint="repeat `kdcloud reap --yes`, or end them in the provider's console",
        )
    if result.unanswered:
        raise TeardownUnconfirmed(
            f"could not look everywhere ({len(result.unanswered)} gave no answer): something may still bill there",
            hint="mend what is said above and look again",
        )


def _drill(schedules: int, seed: int, without: str | None) -> DrillReport:
    """Plays it on every core, with a bar where somebody watches."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orchestrator.drill import drill as play

    console = _console(stderr=True)
    columns = TextColumn("fire drill"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("fire drill", total=schedules)
        return play(
            schedules, seed, without=without, processes=min(os.cpu_count() or 1, 1 + schedules // 50),
            said=lambda done: bar.update(task, completed=done),
        )  # fmt: skip


def _provider_of(known: Any) -> Provisioner | None:
    from orchestrator.session import infra_of, local_price, plan_of, provider_for

    home, _ = _home()
    try:
        made = plan_of(known)
        return provider_for(infra_of(made), home, local_price_micros=local_price(made))
    except UsageError:
        return None


def _home() -> tuple[Any, Any]:
    from orchestrator.config import Home, load_config

    home = Home.from_env()
    return home, load_config(home)


def _ledger() -> AbstractContextManager[Ledger]:
    from orchestrator.session import opened_ledger

    return opened_ledger(_home()[0], say=_talk)


def _amount(text: str, option: str = "--budget") -> Any:
    from orchestrator import money

    try:
        amount = money.parse_amount(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint=f"write it like {option} 50CNY or {option} '$7'") from error
    if amount.value <= 0:
        raise UsageError(f"{option} must be above 0, not {text}", hint=f"write it like {option} 50CNY")
    if amount.hourly:
        raise UsageError(f"{option} is an amount, not a price an hour", hint=f"write it like {option} 50CNY")
    return amount


def _warn_of_the_month(cap_micros: int) -> None:
    """Says so when all runs of this month together leave less than this one's cap."""
    _, config = _home()
    if config.monthly_cap is None:
        return
    from datetime import UTC, datetime

    from orchestrator.budget import shortage

    with _ledger() as ledger:
        text = shortage(ledger, config, cap_micros, datetime.now(UTC))
    if text:
        _talk(f"! {text}\n  -> `kdcloud budget` shows it, `kdcloud budget --month AMOUNT` changes it")


def _duration(text: str, option: str = "--deadline") -> float:
    from orchestrator import money

    try:
        seconds = money.parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint=f"write it like {option} 8h") from error
    if seconds <= 0:
        raise UsageError(f"{option} must be above 0", hint=f"write it like {option} 8h")
    return seconds


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on", hint="add --yes to start without being asked")
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        _talk("\nnothing was started")
        sys.exit(130)
    if not agreed:
        _talk("nothing was started")
        sys.exit(0)


def _say(kind: str, stage: str | None, text: str) -> None:
    _talk(f"{stage}: {text}" if stage else text)


def _talk(text: str) -> None:
    click.echo(text, err=True)


def _print_json(document: Any) -> None:
    click.echo(json_text(document, indent=1))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def main() -> NoReturn:
    """Entry point: user errors become one sentence, a hint and an exit code; bugs keep their traceback."""
    gc.set_threshold(50_000, 20, 20)  # loading modules makes many objects and little garbage: a tenth of a plan's time
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # else it reads the metadata of every package there is
    try:
        kdcloud.main(prog_name="kdcloud", standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        _talk("\nstopped")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except KdcloudError as error:
        _explain(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _talk("\nstopped")
        sys.exit(130)
    except Exception as error:
        _explain_edge(error)
        raise


def _explain_edge(error: Exception) -> None:
    """Errors of bucket and provider carry a message and a hint too; everything else is a bug and goes on."""
    from orchestrator.provision import ProvisionError
    from tasks.bucket import BucketError
    from tasks.contract import TaskError

    if isinstance(error, (BucketError, TaskError, ProvisionError)):
        _explain(error.message, error.hint)
        sys.exit(2)


def _explain(message: str, hint: str) -> None:
    red, off = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    _talk(f"{red}error:{off} {printable(message)}")
    if hint:
        _talk(f"  -> {printable(hint)}")


if __name__ == "__main__":
    main()
