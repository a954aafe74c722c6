"""Which packages does a rented machine get, and what if anything goes wrong? The bootstrap as a process of its own."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import handover, provision_sky
from orchestrator.handover import LOCK_FOLDER, LOCKED
from tasks import bootstrap
from tasks.bootstrap import LOCKS, Choice, Seen, Wanted, choose, look, without_torch

UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_uv = pytest.mark.skipif(UV is None, reason="needs uv: make install-dev")
NEW, OLD = Seen(580, (8, 6)), Seen(550, (8, 6))


def wanted(*names: str, gpu: bool = True) -> Wanted:
    return Wanted({}, [], list(names), {"label": "", "train": ""}, gpu)


# -- the choice


@pytest.mark.parametrize(
    ("names", "seen", "choice", "why"),
    [
        ("label train", NEW, ("label", ""), ""),
        ("label train", Seen(580, (7, 5)), ("label", ""), ""),  # T4
        ("label train", Seen(580, (7, 0)), ("train", "cu126"), "7.0"),  # V100: no code for it in CUDA 13
        ("label train", OLD, ("train", "cu126"), "needs NVIDIA driver 580; this is 550"),
        ("label train", NEW._replace(compiler=False), ("train", ""), "apt install gcc"),
        ("train", NEW, ("train", ""), ""),
        ("train", Seen(525, (9, 0)), ("train", "cu126"), ""),
        ("train", Seen(580, None), ("train", ""), ""),  # a driver that does not tell the card
        ("label train", NEW._replace(kind="linux aarch64"), ("", ""), "for linux aarch64"),
        ("", Seen(), ("", ""), ""),
    ],
)
def test_an_environment_is_taken_that_works_on_the_card_and_its_driver(
    names: str, seen: Seen, choice: tuple[str, str], why: str
) -> None:
    made = choose(wanted(*names.split()), seen)
    assert made[:2] == choice
    assert why in made.why and bool(made.why) == bool(why)


@pytest.mark.parametrize(
    ("names", "seen", "says"),
    [
        ("label", OLD, "needs NVIDIA driver 580; this is 550"),  # the recipe says engine: vllm
        ("train", Seen(470, (7, 0)), "525 or newer"),
        ("train", Seen(570, (10, 0)), "no build of torch"),
        ("train", Seen(), "nvidia-smi shows none"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_fetched(names: str, seen: Seen, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        choose(wanted(*names.split()), seen)
    assert "othing was installed" in str(caught.value)


def test_a_stage_without_a_gpu_gets_what_trains() -> None:
    assert choose(wanted("label", "train", gpu=False), Seen()) == Choice(
        "train", "", "vLLM needs an NVIDIA GPU, and there is none"
    )


def test_code_from_before_there_were_locks_gets_packages_by_version() -> None:
    made = choose(Wanted({}, [], ["train"], {}, True), NEW)
    assert made.environment == "" and "no locked environment train" in made.why


def tool(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "driver", "card"),
    [
        ("580.159.03, 9.0\n", 580, (9, 0)),
        ("535.86, 8.0\n535.86, 7.0\n", 535, (7, 0)),
        ("525.60.13, [N/A]\n", 525, None),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", None, None),
    ],
)
def test_driver_and_card_are_read_from_nvidia_smi(
    says: str, driver: int | None, card: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "nvidia-smi", f"#!/bin/sh\nprintf %s {shlex.quote(says)}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look()[:2] == (driver, card)
    assert not look().compiler  # nothing else is on this path


def test_a_lock_without_torch_keeps_what_torch_does_not_bring() -> None:
    text = "# head\ntokenizers==1 \\\n    --hash=sha256:a\ntorch==2.13.0 \\\n    --hash=sha256:b\n"
    text += "nvidia-nccl-cu13==2 \\\n    --hash=sha256:c\ncuda-toolkit==13 \\\n    --hash=sha256:d\n"
    text += "tqdm==4 \\\n    --hash=sha256:e\n"
    assert without_torch(text) == "# head\ntokenizers==1 \\\n    --hash=sha256:a\ntqdm==4 \\\n    --hash=sha256:e\n"


def test_an_older_python_can_read_it() -> None:
    """Images of Ubuntu 20.04 have Python 3.8, which makes the environment but does not run the tasks."""
    tree = ast.parse(provision_sky.bootstrap_text(), feature_version=(3, 8))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert len(values) > 20 and not any(isinstance(part, ast.Subscript) for one in values for part in ast.walk(one))


def test_both_ends_mean_the_same_by_the_locks() -> None:
    assert all(getattr(handover, name) == getattr(bootstrap, name) for name in ("PACKAGES", "ENVIRONMENTS", "THEN"))
    assert LOCK_FOLDER == LOCKS and set(bootstrap.EXTRA_MODULES) == set(bootstrap.VLLM) < set(LOCKED)
    assert set(LOCKED) == {"label", "train", "label-box", "train-box"}


# -- whole jobs


SHOW = "import os, sys; print('STAGE', sys.executable, os.environ['KDCLOUD_SETUP'], sorted(os.environ))"


@dataclass
class Machine:
    """A home folder, a folder of programs before all others, and code that brings locks."""

    home: Path
    bin: Path

    def run(
        self, names: str, locks: dict[str, str], *words: str, seconds: float = 60.0, script: str = SHOW,
        after: Sequence[str] = (), **env: str,
    ) -> Job:
        """`words` are the bootstrap's, `after` the supervisor's."""
        code = self.home / "code.whl"
        with zipfile.ZipFile(code, "w") as wheel:
            for name, text in locks.items():
                wheel.writestr(zipfile.ZipInfo(f"{LOCKS}/{name}.txt"), text)
        sha256 = hashlib.sha256(code.read_bytes()).hexdigest()
        job = f"job-{time.monotonic_ns()}"
        command = [sys.executable, "-c", provision_sky.bootstrap_text(), "--job", job, "--code", str(code), *words]
        command += ["--sha256", sha256, "--", "python", "-c", script, "--remaining-s", f"{seconds}", *after]
        env = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.home),
            "KDCLOUD_PACKAGES": '{"kd_tiny": "kd-tiny==1.0"}', "KDCLOUD_ENVIRONMENTS": names, **env,
        }  # fmt: skip
        return Job(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

    @property
    def ready(self) -> set[str]:
        """Folders of environments that may be used."""
        return {path.parent.name for path in (self.home / ".kdcloud" / "envs").glob(f"*/{bootstrap.READY}")}


class Job:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> Job:
        self.text, _ = self._process.communicate(timeout=60)
        self.rc = self._process.returncode
        return self

    @property
    def setup(self) -> dict[str, object]:
        found = re.search(r"^STAGE \S+ (\{.*?\})", self.text, re.MULTILINE)
        assert found is not None, self.text
        return json.loads(found[1])  # type: ignore[no-any-return]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    tool(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\necho '580.159.03, 8.6'\n")
    return Machine(tmp_path / "home", tmp_path / "bin")


def fake_uv(machine: Machine, sync: str = "") -> Path:
    """A uv that notes what it is asked. It makes environments whose Python has every module, once something was
    installed into it; before that it does `sync` as well."""
    told = machine.home / "told"
    tool(machine.bin, "uv", f"""#!/bin/bash
echo "$@" >> {shlex.quote(str(told))}; env | grep -c SECRET >> {shlex.quote(str(told))}.env
for last; do :; done
if [ "$1" = venv ]; then
    mkdir -p "$last/bin"
    cat > "$last/bin/python" <<'END'
#!/bin/sh
case "$2" in *find_spec*) [ -e "$(dirname "$0")/whole" ]; exit;; esac
exec {sys.executable} "$@"
END
    chmod +x "$last/bin/python"
else
    for word; do [ "$before" = --python ] && bin=$(dirname "$word"); before=$word; done
    {sync}
    touch "$bin/whole"
fi
""")  # fmt: skip
    return told


def venvs(told: Path) -> int:
    """How many environments were made."""
    return sum(line.startswith("venv ") for line in told.read_text().splitlines())


def test_an_older_driver_gets_the_build_of_torch_that_it_can_run_and_is_told_so(machine: Machine) -> None:
    tool(machine.bin, "nvidia-smi", "#!/bin/sh\necho '550.54.15, 8.6'\n")
    told = fake_uv(machine)
    lock = "torch==2.13.0 \\\n    --hash=sha256:aa\ntriton==3 \\\n    --hash=sha256:bb\n"
    lock += "kd-tiny==1.0 \\\n    --hash=sha256:cc\n"
    job = machine.run("label train", {"train": lock, "label": "vllm==0.24.0\n"}).end()
    assert job.rc == 0, job.text
    assert "[kdcloud] vLLM's wheel is for CUDA 13, which needs NVIDIA driver 580; this is 550" in job.text
    assert job.setup["environment"] == "train" and job.setup["torch"] == "cu126" and "580" in str(job.setup["why"])
    venv, sync, install = told.read_text().splitlines()
    (folder,) = (machine.home / ".kdcloud" / "envs" / name for name in machine.ready)
    assert (venv.split()[0], sync.split()[:2]) == ("venv", ["pip", "sync"])
    assert {"--require-hashes", "--no-build"} <= set(sync.split())
    assert (folder / "lock.txt").read_text() == "kd-tiny==1.0 \\\n    --hash=sha256:cc\n"
    assert install.endswith("torch==2.13.0") and "--torch-backend cu126 " in install


def test_what_was_interrupted_is_made_anew(machine: Machine) -> None:
    half = 'touch "$bin/whole" "$bin/half"; kill -9 $PPID; exit 1'
    told = fake_uv(machine, sync=half)
    locks = {"train": "kd-tiny==1.0\n"}
    assert machine.run("train", locks).end().rc == -9
    (folder,) = (machine.home / ".kdcloud" / "envs").glob("train-*[!k]")
    assert (folder / "bin" / "half").exists() and not machine.ready
    fake_uv(machine)
    job = machine.run("train", locks).end()
    assert job.rc == 0 and machine.ready == {folder.name}, job.text
    assert not (folder / "bin" / "half").exists()
    assert venvs(told) == 2


def test_two_jobs_at_once_make_an_environment_once(machine: Machine) -> None:
    told = fake_uv(machine, sync="sleep 1")
    jobs = [machine.run("train", {"train": "kd-tiny==1.0\n"}) for _ in range(2)]
    texts = [job.end().text for job in jobs]
    assert [job.rc for job in jobs] == [0, 0], texts
    assert sorted(", made in" in text for text in texts) == [False, True]
    assert venvs(told) == 1


def test_an_environment_that_takes_too_long_is_given_up_and_not_used(machine: Machine) -> None:
    fake_uv(machine, sync="exec sleep 20")
    job = machine.run("train", {"train": "kd-tiny==1.0\n"}, seconds=2.0).end()
    assert job.rc == bootstrap.NO_PACKAGES and not machine.ready
    assert "the time was up before `uv pip sync` was done" in job.text and "STAGE" not in job.text


def test_a_full_disk_is_seen_before_it_is_filled(machine: Machine) -> None:
    told = fake_uv(machine)
    job = machine.run("train", {"train": f"# 1 packages, {10**16} bytes to fetch.\nkd-tiny==1.0\n"}).end()
    assert job.rc == bootstrap.NO_PACKAGES and "larger disk" in job.text
    assert "sync" not in told.read_text()


def test_a_machine_ordered_with_a_gpu_that_shows_none_installs_nothing(machine: Machine) -> None:
    tool(machine.bin, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    told = fake_uv(machine)
    job = machine.run("train", {"train": "kd-tiny==1.0\n"}, "--gpu").end()
    assert job.rc == bootstrap.NO_PACKAGES and "nvidia-smi shows none" in job.text
    assert not told.exists()


def test_what_the_owner_of_a_machine_laid_ready_is_used_as_it_is(machine: Machine) -> None:
    """As on a Slurm whose nodes only seem to have GPUs."""
    tool(machine.bin, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    told = fake_uv(machine)
    laid = machine.home / ".kdcloud" / "env" / "bin"
    laid.mkdir(parents=True)
    (laid / "python").symlink_to(sys.executable)
    job = machine.run("label train", {"train": "kd-tiny==1.0\n"}, "--gpu", KDCLOUD_PACKAGES='{"json": "json"}').end()
    assert job.rc == 0 and f"STAGE {laid}/python" in job.text, job.text
    assert job.setup["environment"] == "the machine's own Python" and not told.exists()


def test_an_image_is_used_for_labelling_only_if_it_has_vllm(machine: Machine) -> None:
    fake_uv(machine)
    job = machine.run("label train", {"label": "vllm==0.24.0\n"}, KDCLOUD_PACKAGES='{"json": "json"}').end()
    assert job.rc == 0 and job.setup["environment"] == "label", job.text


def test_what_installs_sees_none_of_the_jobs_secrets(machine: Machine) -> None:
    told = fake_uv(machine)
    secrets = {"AWS_SECRET_ACCESS_KEY": "SECRET", "HF_TOKEN": "SECRET", "KDCLOUD_CODE_URL": "SECRET"}
    secrets["DEEPSEEK_API_KEY"] = "SECRET"  # as a recipe's key_env may be called
    job = machine.run("train", {"train": "kd-tiny==1.0\n"}, **secrets).end()
    assert job.rc == 0, job.text
    assert set(Path(f"{told}.env").read_text().split()) == {"0"}
    assert "AWS_SECRET_ACCESS_KEY" in job.text  # the stage has its keys


def test_packages_by_version_have_a_folder_of_their_own_too(machine: Machine) -> None:
    told = fake_uv(machine)
    job = machine.run("", {}, KDCLOUD_CONSTRAINTS='["other==2.0"]').end()
    (folder,) = (machine.home / ".kdcloud" / "envs" / name for name in machine.ready)
    assert job.rc == 0 and folder.name.startswith("packages-"), job.text
    assert (folder / "constraints.txt").read_text() == "other==2.0\n"
    assert told.read_text().splitlines()[1].endswith(f"-c {folder}/constraints.txt kd-tiny==1.0")


def test_a_machine_without_uv_and_pip_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tool(tmp_path, "python3", "#!/bin/sh\nexit 1\n")))
    with pytest.raises(ValueError, match=r"has no uv(.|\n)*`python3 -m pip` ended with 1(.|\n)*python3-pip"):
        bootstrap.find_uv(tmp_path / "own", time.monotonic() + 9)


def test_an_environment_whose_torch_does_not_compute_is_not_taken(tmp_path: Path) -> None:
    python = tool(tmp_path, "python", "#!/bin/sh\ncase \"$2\" in *cuda*) exit 1;; esac\n")
    with pytest.raises(ValueError, match="does not compute on this GPU"):
        bootstrap.check(str(python), ["torch"], gpu=True)
    bootstrap.check(str(python), ["torch"], gpu=False)


@pytest.mark.parametrize(("fails", "asked"), [("only-managed", 2), ("venv", 2), ("never", 1)])
def test_a_machine_with_an_old_python_gets_one_from_uv_or_from_wherever_uv_finds_it(
    fails: str, asked: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST", (3, 99))
    told = machine.home / "told"
    text = f'#!/bin/sh\necho "$@" >> {shlex.quote(str(told))}\ncase "$*" in *{fails}*) exit 1;; esac\n'
    uv, folder = str(tool(machine.bin, "uv", text)), machine.home / "env"
    if fails == "venv":
        with pytest.raises(ValueError, match="it takes a Python from"):
            bootstrap.make_venv(uv, folder, time.monotonic() + 9)
    else:
        bootstrap.make_venv(uv, folder, time.monotonic() + 9)
    words = told.read_text().splitlines()
    assert len(words) == asked and words[0] == f"venv --quiet --python 3.12 --python-preference only-managed {folder}"


# -- with a real uv, from wheels in a folder


def wheel_of(folder: Path, name: str, version: str) -> str:
    """A wheel with one module, and the line of a lock for it."""
    folder.mkdir(exist_ok=True)
    module, path = name.replace("-", "_"), folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def from_folder(machine: Machine) -> dict[str, str]:
    """What lets the real uv find these wheels and nothing else."""
    assert UV is not None
    (machine.bin / "uv").symlink_to(UV)
    config = machine.home / "uv.toml"
    config.write_text(f"no-index = true\nfind-links = ['{machine.home / 'wheels'}']\n")
    return {"UV_CONFIG_FILE": str(config), "UV_CACHE_DIR": str(machine.home / "cache")}


@needs_uv
def test_two_kinds_of_stages_have_environments_side_by_side_and_find_them_again(
    machine: Machine, from_folder: dict[str, str]
) -> None:
    wheels = machine.home / "wheels"
    train, label = wheel_of(wheels, "kd-tiny", "1.0"), wheel_of(wheels, "kd-tiny", "2.0")
    locks = {"train": train, "label": label + wheel_of(wheels, "vllm", "0.24")}
    jobs = [machine.run(names, locks, **from_folder).end() for names in ("label train", "train", "label train")]
    assert [job.rc for job in jobs] == [0, 0, 0], jobs[0].text
    assert [", made in" in job.text for job in jobs] == [True, True, False]
    assert [job.setup["environment"] for job in jobs] == ["label", "train", "label"]
    versions = []
    for name in sorted(machine.ready):
        python = machine.home / ".kdcloud" / "envs" / name / "bin" / "python"
        code = "import kd_tiny, importlib.util as u; print(kd_tiny.version, u.find_spec('vllm') is not None)"
        versions.append((name[:5], subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.split()))
    assert versions == [("label", ["2.0", "True"]), ("train", ["1.0", "False"])]
    changed = machine.run("train", {"train": f"# moved\n{train}"}, **from_folder).end()
    assert ", made in" in changed.text and len(machine.ready) == 3  # named by what is in it


@needs_uv
def test_a_file_of_another_hash_is_not_installed(machine: Machine, from_folder: dict[str, str]) -> None:
    line = wheel_of(machine.home / "wheels", "kd-tiny", "1.0")
    wrong = re.sub(r"sha256:....", "sha256:0000", line)
    job = machine.run("train", {"train": wrong}, **from_folder).end()
    assert job.rc == bootstrap.NO_PACKAGES and not machine.ready
    assert "environment train could not be made: `uv pip sync` ended with" in job.text and "STAGE" not in job.text
    assert machine.run("train", {"train": line}, **from_folder).end().rc == 0


@needs_uv
def test_a_package_without_a_hash_is_not_installed(machine: Machine, from_folder: dict[str, str]) -> None:
    wheel_of(machine.home / "wheels", "kd-tiny", "1.0")
    job = machine.run("train", {"train": "kd-tiny==1.0\n"}, **from_folder).end()
    assert job.rc == bootstrap.NO_PACKAGES and "hash" in job.text


@needs_uv
def test_a_lock_that_lacks_what_the_stage_imports_is_found_out(machine: Machine, from_folder: dict[str, str]) -> None:
    job = machine.run("train", {"train": wheel_of(machine.home / "wheels", "other", "1.0")}, **from_folder).end()
    assert job.rc == bootstrap.NO_PACKAGES and "lacks one of kd_tiny" in job.text and not machine.ready


# -- several stages


CHAIN = """
import json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
told = [words["--stage"], words["--attempt"], words["--remaining-s"], os.environ["KDCLOUD_SETUP"]]
print("STAGE", *told, "THEN" in str(os.environ))
stop = Path.home() / words["--stage"]
if stop.exists(): exec(stop.read_text())
"""


def chain(machine: Machine, then: str = "train:2:20,evaluate:1:10", seconds: float = 100.0) -> Job:
    locks = {"train": "kd-tiny==1.0\n", "label": "vllm==0.24.0\n"}
    own = {"KDCLOUD_PACKAGES": {"kd_tiny": "kd-tiny==1.0"}}
    more = [{**own, "KDCLOUD_ENVIRONMENTS": [name]} for name in ("train", "label")]
    words = ["--stage", "label", "--attempt", "1", "--then", then]
    return machine.run("label", locks, seconds=seconds, script=CHAIN, after=words, KDCLOUD_THEN=json.dumps(more)).end()


def stages(job: Job) -> list[tuple[str, str, float, str]]:
    """(name, attempt, seconds left, environment) of each stage that was started."""
    found = re.findall(r"^STAGE (\S+) (\S+) (\S+) (\{.*?\}) False$", job.text, re.MULTILINE)
    return [(name, number, float(left), json.loads(setup)["environment"]) for name, number, left, setup in found]


def test_each_stage_of_a_job_gets_its_environment_and_the_time_that_later_ones_leave(machine: Machine) -> None:
    told = fake_uv(machine)
    job = chain(machine)
    assert job.rc == 0, job.text
    (label, train, evaluate) = stages(job)
    assert [one[:2] + one[3:] for one in (label, train, evaluate)] == [
        ("label", "1", "label"), ("train", "2", "train"), ("evaluate", "1", "label"),
    ]  # fmt: skip
    assert 60 < label[2] <= 70 and label[2] + 10 < train[2] <= 90 and train[2] < evaluate[2] <= 100
    assert venvs(told) == 2  # the third finds the first one's
    assert job.text.rstrip().endswith("ended with 0")


def test_a_stage_that_is_not_done_ends_the_job_with_its_status(machine: Machine) -> None:
    fake_uv(machine)
    (machine.home / "train").write_text("sys.exit(11)")
    job = chain(machine)
    assert job.rc == 11 and [one[0] for one in stages(job)] == ["label", "train"], job.text


def test_a_stop_that_comes_while_a_stage_ends_by_itself_starts_no_other(machine: Machine) -> None:
    fake_uv(machine)
    stop = "import signal; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 15); time.sleep(0.3)"
    (machine.home / "label").write_text(stop)
    job = chain(machine)
    assert job.rc == 128 + 15 and [one[0] for one in stages(job)] == ["label"], job.text


def test_an_environment_of_a_later_stage_that_cannot_be_made_ends_the_job(machine: Machine) -> None:
    fake_uv(machine, sync='case "$*" in *train*) exit 1;; esac')
    job = chain(machine)
    assert job.rc == bootstrap.NO_PACKAGES and [one[0] for one in stages(job)] == ["label"], job.text
