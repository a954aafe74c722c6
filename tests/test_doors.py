"""The way to a box: what its machine says is checked, both ends are loopback, and secrets are in no command."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.doors import (
    USUAL_PORTS,
    Door,
    Doorman,
    Target,
    Way,
    connect_argv,
    forward_argv,
    free_port,
    lines_of,
    listens,
    parse_doors,
    read_argv,
    read_doors,
)
from orchestrator.provision import ProvisionError, Reach
from orchestrator.provision_local import LocalProvisioner
from orchestrator.provision_sky import Note, SkyProvisioner
from tasks.contract import BOX_FOLDER, CONNECT_FILE

TOLD = {
    "tensorboard": {"port": 40002, "path": "/abc-DEF_1/"},
    "jupyter": {"port": 40001, "path": "/lab/tree/work/start.ipynb?token=secret-token"},
}
SSH = Reach(
    ("~/.kdcloud/work/train-1", "~/.sky_clusters/kd-a-????????/.kdcloud/work/train-1"),
    ("ssh", "-F", "/home/me/.sky/x"),
    "kd-a",
)
TARGET = Target("kd-a", "train-1", "train")


def test_doors_come_in_one_order_whatever_the_machine_says() -> None:
    assert parse_doors(json.dumps(TOLD)) == (
        Door("jupyter", 40001, "/lab/tree/work/start.ipynb?token=secret-token"),
        Door("tensorboard", 40002, "/abc-DEF_1/"),
    )


@pytest.mark.parametrize(
    "told",
    [
        [],
        {},
        {"telnet": {"port": 40001, "path": "/"}},
        {"jupyter": {"port": 22, "path": "/"}},
        {"jupyter": {"port": "40001", "path": "/"}},
        {"jupyter": {"port": True, "path": "/"}},
        {"jupyter": {"port": 40001, "path": "@evil.example/"}},
        {"jupyter": {"port": 40001, "path": "/\x1b]0;title\x07"}},
        {"jupyter": {"port": 40001, "path": "/a b"}},
        {"chat": {"port": 40001, "path": "/", "login": ["me", "\x1b[2J"]}},
        {"chat": {"port": 40001, "path": "/", "login": ["me"]}},
    ],
)
def test_a_machine_that_says_anything_else_is_not_believed(told: object) -> None:
    with pytest.raises((ValueError, AttributeError)):
        parse_doors(json.dumps(told))


def test_both_ends_of_a_forward_are_loopback_and_no_secret_is_in_a_command() -> None:
    control = Path("/tmp/kd-x/s")
    argv = forward_argv(SSH, control, {8888: 40001, 6006: 40002})
    at = [n for n, word in enumerate(argv) if word == "-L"]
    assert [argv[n + 1] for n in at] == ["127.0.0.1:8888:127.0.0.1:40001", "127.0.0.1:6006:127.0.0.1:40002"]
    first = connect_argv(SSH, control)
    assert all(words[-2:] == ["--", "kd-a"] for words in (argv, first))
    assert {"BatchMode=yes", "ForwardAgent=no", "-M", "-N"} <= set(first) and "-g" not in [*argv, *first]
    assert "token" not in " ".join([*first, *argv, *read_argv(SSH, control, "train")])


def test_what_stands_in_a_command_for_a_shell_is_quoted() -> None:
    script = read_argv(SSH, Path("/tmp/kd-x/s"), "a; rm -rf ~")[-1]
    file = f"work/'a; rm -rf ~'/{BOX_FOLDER}/{CONNECT_FILE}"
    own, allocations = (f"{folder}/{file}" for folder in SSH.folders)
    assert script == f"cat {own} 2>/dev/null || cat {allocations}"


def test_addresses_are_those_of_this_machine() -> None:
    doors = (*parse_doors(json.dumps(TOLD)), Door("chat", 40003, "/", ("box", "pass-word")))
    assert lines_of(doors, {"jupyter": 8888, "tensorboard": 6006, "chat": 8080}) == [
        "JupyterLab   http://127.0.0.1:8888/lab/tree/work/start.ipynb?token=secret-token",
        "TensorBoard  http://127.0.0.1:6006/abc-DEF_1/",
        "Open WebUI   http://127.0.0.1:8080/",
        "             log in as box with pass-word",
    ]


def write_connect(folder: Path, told: object = TOLD) -> Path:
    path = folder / "work" / "train" / BOX_FOLDER / CONNECT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))
    return path


def test_on_this_machine_the_file_is_read_where_the_job_has_it(tmp_path: Path) -> None:
    provider = LocalProvisioner(tmp_path)
    reach = provider.reach("kd-a", "train-1")
    with pytest.raises(ProvisionError):
        read_doors(reach, "train")
    write_connect(tmp_path / "machines" / "kd-a")
    assert read_doors(reach, "train") == parse_doors(json.dumps(TOLD))


class Api:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ssh_config(self, name: str) -> Path:
        key = self.folder / "ssh-keys" / f"{name}.key"
        key.parent.mkdir()
        key.touch()
        return self.folder / "ssh" / name


class Slurm:
    def clusters(self) -> list[str]:
        return ["lab"]


@pytest.mark.parametrize(
    ("infra", "folders"),
    [
        ("aws", SSH.folders[:1]),
        ("slurm/lab", SSH.folders),
    ],
)
def test_rented_machines_are_reached_the_way_skypilot_says(
    tmp_path: Path, infra: str, folders: tuple[str, ...]
) -> None:
    provider = SkyProvisioner(tmp_path, api=Api(tmp_path), slurm=Slurm())  # type: ignore[arg-type]
    provider._write(Note("kd-a", order={"offer": {"infra": infra}}))
    reach = provider.reach("kd-a", "train-1")
    words = ("ssh", "-F", f"{tmp_path}/ssh/kd-a", "-i", f"{tmp_path}/ssh-keys/kd-a.key")
    assert reach == Reach(folders, words, "kd-a")


STAND_IN = """
    import json, pathlib, socket, sys, time
    words, here = sys.argv[1:], pathlib.Path(__file__).parent
    control = pathlib.Path(words[words.index("-S") + 1])
    if "forward" in words:
        ends = [words[n + 1] for n, word in enumerate(words) if word == "-L"]
        control.with_name("ends").write_text(json.dumps(ends))
        while not control.with_name("done").exists():
            if control.with_name("refused").exists():
                sys.exit("port taken")
            time.sleep(0.02)
    elif "-M" not in words:
        print("" if "check" in words else (here / "connect.json").read_text())
    else:
        (here / "starts").open("a").write("x")
        time.sleep(0.2)
        control.touch()
        sockets = []
        while not (here / "break").exists():
            time.sleep(0.02)
            if not sockets and control.with_name("ends").exists():
                for end in json.loads(control.with_name("ends").read_text()):
                    host, port = end.split(":")[:2]
                    one = socket.socket()
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        one.bind((host, int(port)))
                    except OSError:
                        control.with_name("refused").touch()
                        sys.exit("port taken")
                    one.listen()
                    sockets.append(one)
                control.with_name("done").touch()
        sys.exit("it broke")
"""


class Provider:
    def __init__(self, ssh: Path) -> None:
        self._ssh = ssh

    def reach(self, name: str, job_id: str) -> Reach:
        return Reach(("~/x",), (sys.executable, str(self._ssh)), name)


def until(happens, limit_s: float = 90.0) -> None:
    began = time.monotonic()
    while not happens():
        assert time.monotonic() - began < limit_s
        time.sleep(0.05)


@pytest.fixture
def any_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run side by side must not take each other's."""
    monkeypatch.setattr("orchestrator.doors.USUAL_PORTS", dict.fromkeys(USUAL_PORTS, 0))


@pytest.mark.usefixtures("any_ports")
def test_the_way_is_opened_told_made_anew_when_it_breaks_and_closed(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh.py"
    ssh.write_text(textwrap.dedent(STAND_IN))
    (tmp_path / "connect.json").write_text(json.dumps(TOLD))
    told: list[list[str]] = []
    said: list[str] = []
    doorman = Doorman(Provider(ssh), told.append, said.append)
    doorman.start()
    try:
        doorman.look(replace(TARGET, is_open=False))
        until(lambda: (tmp_path / "starts").exists())  # the connection is made while the servers start
        time.sleep(0.3)
        assert told == []
        doorman.look(TARGET)
        until(lambda: told)
        ports = [int(line.split(":")[2].partition("/")[0]) for line in told[0]]
        assert len(ports) == 2 and all(listens(port) for port in ports)
        doorman.look(replace(TARGET, is_open=False))  # it saves, say
        time.sleep(0.5)
        assert said == [] and (tmp_path / "starts").read_text() == "x" and all(listens(port) for port in ports)
        doorman.look(TARGET)
        (tmp_path / "break").touch()
        until(lambda: said)
        (tmp_path / "break").unlink()
        until(lambda: len(said) == 2)
        assert said[0] == "the connection to the box ended: it broke; it is tried again"
        assert said[1].endswith("at the same addresses") and len(told) == 1  # a token is printed once
        assert all(listens(port) for port in ports)
    finally:
        doorman.close()
    assert not any(listens(port) for port in ports) and not doorman.is_alive()
    assert (tmp_path / "starts").read_text() == "xx"


def test_the_way_is_tried_again_whatever_went_wrong_and_the_same_is_said_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("orchestrator.doors.AGAIN_S", 0.01)
    calls: list[str] = []

    class Broken:
        def reach(self, name: str, job_id: str) -> Reach:
            calls.append(name)
            raise KeyError("a bug")

    said: list[str] = []
    doorman = Doorman(Broken(), lambda lines: None, said.append)
    doorman.start()
    try:
        doorman.look(TARGET)
        until(lambda: len(calls) > 2)
        assert said == ["the way to the box: KeyError('a bug'); it is tried again"]
    finally:
        doorman.close()


@pytest.mark.usefixtures("any_ports")
def test_a_port_that_somebody_took_meanwhile_is_left_to_them(tmp_path: Path) -> None:
    """The machine costs money while the same port would be tried again and again."""
    import socket

    ssh = tmp_path / "ssh.py"
    ssh.write_text(textwrap.dedent(STAND_IN))
    (tmp_path / "connect.json").write_text(json.dumps(TOLD))
    told: list[list[str]] = []
    doorman = Doorman(Provider(ssh), told.append, lambda text: None)
    doorman.start()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            doorman.look(TARGET)
            until(lambda: told)
            ports = [int(line.split(":")[2].partition("/")[0]) for line in told[0]]
            (tmp_path / "break").touch()
            until(lambda: not listens(ports[0]))
            other.bind(("127.0.0.1", ports[0]))
            other.listen()
            (tmp_path / "break").unlink()
            until(lambda: len(told) == 2)
            now = [int(line.split(":")[2].partition("/")[0]) for line in told[1]]
            assert now[0] != ports[0] and now[1] == ports[1] and all(listens(port) for port in now)
        finally:
            doorman.close()


def test_without_ssh_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="no ssh on this computer"):
        Way(Reach(("~/x",), (str(tmp_path / "no-ssh"),), "m")).open(lambda: True)


def test_a_usual_port_that_is_taken_is_left_to_whoever_has_it() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = int(other.getsockname()[1])
        found = free_port(taken)
        assert found not in (0, taken)
