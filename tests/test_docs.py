"""What the documents say of money, of the reaper and of how it is set up is what the code does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from orchestrator import money, offers, provision_sky, runner, spend
from orchestrator.cli import kdcloud
from orchestrator.config import DEFAULT_RATE, Home, load_config
from orchestrator.drill import REAP_EVERY_S
from orchestrator.guarded import CALL_LIMIT_S
from orchestrator.provision import Latencies, Order
from orchestrator.provision_local import local_offer
from orchestrator.reaper import CLOCK_WRONG, GRACE
from orchestrator.testing import START, fake_offer

ROOT = Path(__file__).parents[1]
MONEY, REAPER = ROOT / "docs" / "money.md", ROOT / "docs" / "reaper.md"
WHERE = {
    "your own machine": ("local", local_offer(0).latencies),
    "Slurm": ("slurm", provision_sky.SLURM_LATENCIES),
    "Kubernetes": ("kubernetes", provision_sky.LIMITED_LATENCIES),
    "AWS, RunPod, Lambda, Vast": ("aws", provision_sky.CLOUD_LATENCIES),
}


def latency_rows() -> list[str]:
    """The table of docs/money.md, from the code."""
    rows = []
    for words, (cloud, lat) in WHERE.items():
        order = Order("kd-x", "r", "s", fake_offer(infra=cloud), START, 3600.0)
        limit = "yes" if cloud != "local" and provision_sky.time_to_live(cloud, order) else "no"
        parts = (lat.tick_s, lat.flush_s, lat.api_s, lat.provision_s, lat.handover_s, lat.slack_s)
        parts += (lat.unguarded_s, lat.total_s)
        rows.append(f"| {words} | {' | '.join(f'{part:g}' for part in parts)} | {limit} |")
    return rows


def usd(micros: int) -> str:
    return money.usd(micros)


def sums() -> list[str]:
    """The worked examples of docs/money.md, from the code."""
    lat = provision_sky.CLOUD_LATENCIES
    lines = ["What the delays of one machine on a cloud reserve:", ""]
    for words, price in (("RTX 3090", 220_000), ("A100", 3_670_000), ("8 x H100", 30_000_000)):
        micros = spend.latency_reserve_micros(fake_offer(price, latencies=lat))
        lines.append(f"- {words} at {usd(price)} an hour: {lat.total_s:g} s x {usd(price)} / 3600 s = {usd(micros)}")
    offer, reserved = fake_offer(500_000, latencies=lat), 1_000_000
    life = spend.lifetime_s(offer, reserved)
    late = spend.worst_case_micros(offer, reserved=reserved, age_s=10_800)
    lines += [
        "",
        f"{usd(reserved)} reserved for a machine at {usd(500_000)} an hour pay for {reserved * 3600 // 500_000:,} s; "
        f"less {lat.total_s:g} s of delays,",
        f"its work stops at the age of {life:,.0f} s ({life / 3600:.2f} h). If it does all it may, it costs "
        f"{usd(spend.cost_micros(offer, life + lat.total_s))}.",
        "",
        "The same machine, if the provider still refuses its teardown at the age of 3 h: (10,800 + "
        f"{lat.api_s:g} + {lat.provision_s:g}) s x {usd(500_000)} / 3600 s =",
        f"{usd(late)} in the worst case, {usd(late - reserved)} over what was reserved, and growing.",
    ]
    return lines


def between(text: str, mark: str) -> list[str]:
    """Lines between `<!-- mark -->` and `<!-- end -->`."""
    return text.partition(f"<!-- {mark} -->\n")[2].partition("\n<!-- end -->")[0].splitlines()


def test_the_delays_in_the_docs_are_those_that_are_reserved():
    assert offers.CLOUD_LATENCIES == provision_sky.CLOUD_LATENCIES  # the table of prices and SkyPilot agree
    assert between(MONEY.read_text(), "table: latencies")[2:] == latency_rows(), "\n".join(latency_rows())


def test_the_columns_of_the_table_are_all_there_is():
    assert list(Latencies.__dataclass_fields__) == [
        "tick_s",
        "flush_s",
        "api_s",
        "provision_s",
        "handover_s",
        "slack_s",
        "unguarded_s",
    ]


def test_the_sums_in_the_docs_are_those_of_the_code():
    assert between(MONEY.read_text(), "sums") == sums(), "\n".join(sums())


def test_numbers_in_the_text_are_those_of_the_code():
    text = " ".join((MONEY.read_text() + REAPER.read_text()).split())
    assert f"gives the call up after {CALL_LIMIT_S:g} s" in text
    assert f"ended after {runner.PROVISION_LIMIT_S / 60:g} minutes" in text
    assert timedelta(minutes=2) == GRACE and "2 minutes ago or more" in text
    assert spend.DEARER == 2 and "twice the price ordered" in text
    lat = provision_sky.CLOUD_LATENCIES
    assert lat.unguarded_s == REAP_EVERY_S + GRACE.total_seconds() + lat.ending_s and "every 5 minutes" in text
    assert timedelta(hours=3) == CLOCK_WRONG and "until 3 hours after its deadline" in text


def test_every_failure_has_a_row():
    rows = MONEY.read_text().partition("## What each failure does")[2].splitlines()
    kinds = ["launch", "teardown", "time", "work", "price", "data", "control"]
    assert [kind for kind in kinds if any(f"**{kind}:**" in row for row in rows)] == kinds
    assert len([row for row in rows if row.startswith("| ")]) >= 28


# -- how the reaper is set up ------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """Code blocks of docs/reaper.md."""
    return re.findall(rf"^```{language}\n(.*?)^```$", REAPER.read_text(), re.M | re.S)


def check_words(command: str) -> None:
    """`kdcloud ...` is a command line that is understood."""
    words = shlex.split(command, comments=True)
    assert Path(words[0]).name == "kdcloud"
    kdcloud.commands[words[1]].make_context(words[1], words[2:])


def test_every_command_line_in_the_docs_is_understood():
    lines = re.findall(r"^    (kdcloud .*)$", REAPER.read_text(), re.M)
    lines += re.findall(r"`(kdcloud (?:budget|reap) [^`]*)`", MONEY.read_text() + REAPER.read_text())
    assert len(lines) >= 6
    for line in lines:
        check_words(line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_units(tmp_path):
    paths = re.findall(r"`~/\.config/systemd/user/([^`]+)`", REAPER.read_text())
    units = dict(zip(paths, blocks("ini"), strict=True))
    assert set(units) == {"kdcloud-reap.service", "kdcloud-reap.timer", "kdcloud-watch.service"}
    for name, body in units.items():
        for command in re.findall(r"^ExecStart=(.*)$", body, re.M):
            check_words(command.replace("%h", "/home/you"))
        (tmp_path / name).write_text(body.replace("%h/.local/bin/kdcloud", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or line.startswith("kdcloud-")]
    assert (done.returncode, said) == (0, []), done.stderr


def check_schedule(text: str) -> None:
    """Five fields, each within its range."""
    limits = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]
    fields = text.split()
    assert len(fields) == 5
    for field, (low, high) in zip(fields, limits, strict=True):
        match = re.fullmatch(r"(\*|\d+(?:-\d+)?)(?:/(\d+))?", field)
        assert match, field
        assert all(low <= int(number) <= high for number in re.findall(r"\d+", match[1]))
        assert match[2] is None or 0 < int(match[2]) <= high


def test_the_cron_line_is_one():
    (line,) = blocks("cron")
    fields = line.split(None, 5)
    check_schedule(" ".join(fields[:5]))
    assert "%" not in fields[5]  # cron makes a newline of it
    check_words(fields[5].partition(" >>")[0])
    assert subprocess.run(["sh", "-n", "-c", fields[5]], check=False).returncode == 0


def test_the_github_workflow_parses_and_its_commands_are_understood():
    (text,) = [block for block in blocks("yaml") if "jobs:" in block]
    flow = yaml.safe_load(text)
    check_schedule(flow[True]["schedule"][0]["cron"])  # YAML reads `on` as true; GitHub does not
    assert flow["permissions"] == {"contents": "read", "id-token": "write"}
    (job,) = flow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert len(commands) == 2
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
        assert "${{" not in command  # what a variable holds must not become shell
    check_words(commands[-1].strip().splitlines()[-1])
    assert {"--yes", "--json"} <= set(commands[-1].split())


def test_the_workflow_writes_a_configuration_that_is_understood(tmp_path):
    (text,) = [block for block in blocks("yaml") if "jobs:" in block]
    (job,) = yaml.safe_load(text)["jobs"].values()
    script = job["steps"][-1]["run"].replace("kdcloud reap", "true")
    env = {"KDCLOUD_HOME": str(tmp_path / "kd"), "OWNER": "abc123", "BUCKET": "s3://b/kd", "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-ec", script], env=env, check=True)
    config = load_config(Home(tmp_path / "kd"))
    assert (config.owner, config.bucket, config.rate) == ("abc123", "s3://b/kd", DEFAULT_RATE)
    (example,) = [block for block in blocks("yaml") if "jobs:" not in block]
    (tmp_path / "kd" / "config.yaml").write_text(example)
    assert load_config(Home(tmp_path / "kd")).owner == "abc123"


def test_the_rights_in_the_docs_are_those_that_are_used():
    (text,) = blocks("json")
    policy = json.loads(text)
    granted = {action for part in policy["Statement"] for action in part["Action"] if action.startswith("ec2:")}
    source = (ROOT / "orchestrator" / "reap_ec2.py").read_text()
    calls = set(re.findall(r"\b((?:describe|terminate|cancel)_[a-z_]+)[(\"]", source))
    assert granted == {"ec2:" + "".join(word.title() for word in call.split("_")) for call in calls}
    ends = [part for part in policy["Statement"] if "ec2:TerminateInstances" in part["Action"]]
    assert all("kd-" in json.dumps(part["Condition"]) for part in ends)


def test_both_are_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert "(docs/money.md)" in readme and "(docs/reaper.md)" in readme
