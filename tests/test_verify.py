"""Is the answer read where it stands, judged by the asked rule, and never executed?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import verify
from tasks.verify import Verdict, check

OK = Verdict(True, "ok")
ROOT = Path(verify.__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("work 95\n</think>95", OK),
        ("work\n</think>\n\n 95 \n", OK),
        ("95", OK),  # a model that does not think aloud
        ("it is 95\n</think>94", Verdict(False, "wrong")),  # the right number stands in the thinking only
        ("95</think>94</think>95", OK),
        ("<think>95", Verdict(False, "no_answer")),
        ("95\n</think>  ", Verdict(False, "no_answer")),
    ],
)
def test_the_answer_is_read_after_the_thinking_only(text: str, verdict: Verdict) -> None:
    assert check("exact", text, "95") == verdict


def test_an_answer_inside_thinking_that_the_prompt_opened_does_not_count() -> None:
    assert check("exact", "95", "95", thinking=True) == Verdict(False, "no_answer")
    assert check("exact", "w</think>95", "95", thinking=True) == OK


def test_without_a_reference_nothing_is_right_but_none_accepts_everything() -> None:
    assert check("exact", "95", None) == Verdict(False, "no_reference")
    assert check("none", "", None, thinking=True) == OK


def test_an_unknown_kind_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="maths"):
        check("maths", "1", "1")


@pytest.mark.parametrize(
    ("said", "answer", "ok"),
    [
        ("So the answer is \\boxed{42}.", "42", True),
        ("We get 1,234 in all", "1234", True),
        ("x = 0.50", "0.5", True),
        ("\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{2}}", True),
        ("first 42, then 43", "42", False),
        ("\\boxed{41} is not 42", "42", False),
        ("no idea", "42", False),
    ],
)
def test_without_math_verify_the_last_boxed_value_or_number_decides_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, said: str, answer: str, ok: bool
) -> None:
    monkeypatch.setattr(verify, "math_verify_installed", lambda: False)
    assert check("math", said, answer).ok is ok
    assert "math-verify is not installed" in (verify.note("math") or "")
    assert verify.note("exact") is None


def test_math_answers_are_compared_by_value_in_a_child() -> None:
    pytest.importorskip("math_verify")
    assert check("math", "thus $\\frac{1}{2}$", "0.5") == OK
    assert check("math", "thus $\\boxed{x^2+2x+1}$", "(x+1)^2") == OK
    assert check("math", "thus $\\boxed{3}$", "4") == Verdict(False, "wrong")
    # What would harm if it were run is text like any other.
    assert not check("math", "\\boxed{__import__('os').abort()}", "1").ok
    assert verify.note("math") is None


@pytest.mark.parametrize(
    "harm",
    ["os.system('1')", "os.fork()", "subprocess.run(['1'])", "socket.socket()", "open(PATH, 'w')", "os.remove(PATH)"],
)
def test_what_a_comparison_never_needs_the_child_is_refused(harm: str, tmp_path: Path) -> None:
    """In a process of its own, since an audit hook stays for good."""
    (tmp_path / "there").write_text("before")
    code = (
        f"import os, socket, subprocess, sys; PATH = {str(tmp_path / 'there')!r}\n"
        f"sys.path.insert(0, {str(ROOT)!r}); from tasks.verify import _refuse; sys.addaudithook(_refuse)\n"
        f"try: {harm}\nexcept PermissionError: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
    assert (tmp_path / "there").read_text() == "before"


MATH = """
import sys
from types import SimpleNamespace
def parse(text): return text
def verify(answer, said):
    print("a library that talks")
    if said == "hang":
        while True: pass
    if said == "grow":
        return bytearray(3 << 30)
    if said == "leave":
        import subprocess
        subprocess.run(["true"])
    return answer == f"${said}$"
"""


def test_the_real_child_survives_chatter_hanging_memory_and_what_it_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text(MATH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = verify._Child(timeout_s=0.5, memory_bytes=1 << 30)
    try:
        assert child.check("1", "1") == OK
        assert child.check("grow", "1") == child.check("leave", "1") == Verdict(False, "wrong")
        assert child.check("hang", "1") == Verdict(False, "check_timed_out")
        assert child.check("2", "1") == Verdict(False, "wrong")
    finally:
        child.close()


FAKE = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    said, answer = json.loads(line)
    if said == "die":
        sys.exit(9)
    if said != "hang":
        print(json.dumps(said == answer), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> verify._Child:
    """A child that answers at once, hangs or dies on demand, and its parent with a short patience."""
    script = tmp_path / "child.py"
    script.write_text(FAKE)
    monkeypatch.setattr(verify, "__file__", str(script))
    made = verify._Child(timeout_s=0.3)
    yield made
    made.close()


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works(child: verify._Child) -> None:
    assert child.check("1", "1") == OK
    assert child._process is not None
    pid = child._process.pid
    assert child.check("hang", "1") == Verdict(False, "check_timed_out")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert child.check("1", "1") == OK


def test_a_child_that_dies_costs_one_answer_only(child: verify._Child) -> None:
    assert child.check("die", "1").ok is False
    assert child.check("2", "1") == Verdict(False, "wrong")


GOOD = (
    "Distillation trains a small model on the outputs of a large one. The small model sees probabilities, "
    "not only words, and therefore learns from fewer examples than it would otherwise need."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, "ok"),
        ("thinking </think>" + GOOD, "ok"),
        ("蒸馏让小模型学习大模型的输出，因此只需要更少的样本。", "ok"),
        ("Yes.", "too_short"),
        ("I will say this again and again. " * 12, "repetitive"),
        ("loop the loop of loops again " * 12 + "</think>" + GOOD, "repetitive"),
        ("The answer, 因此我们得到答案是四十二个苹果和橙子, is plain to see.", "mixed_language"),
        ("The answer \ufffd\ufffd\ufffd is not readable here", "unreadable"),
        ("a " + "word" * 40_000 + " is too long", "too_long"),
    ],
)
def test_free_text_is_judged_by_length_repetition_and_language(text: str, reason: str) -> None:
    assert check("text", text, None).reason == reason


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 40, True),
        ([1, 2, 3] * 20, True),
        ([*range(20), *[7, 8] * 10], True),  # 20 of 40 tokens
        ([*range(100), *[7, 8] * 10], False),  # 20 of 120: less than a third
        ([*range(20), *[5, 6, 7, 8, 9, 4] * 3, 5], False),  # three rounds and a bit
        ([*range(20), *[5, 6, 7, 8, 9, 4] * 4], True),
        ([7] * 15, False),  # an answer may be 000000
        ([7] * 16, True),
        ([1, 2, 3] * 20 + [9], False),  # it came out of it
        (list(range(300)), False),
        ([], False),
        ([*range(600)] * 4, False),  # chapters, not a loop
    ],
)
def test_an_answer_loops_when_it_ends_in_one_run_of_tokens_over_and_over(ids: list[int], loops: bool) -> None:
    assert verify.loops(ids) is loops


def test_no_long_answer_takes_long_to_be_looked_at() -> None:
    """The worst for it: just less than a third is one token."""
    ids = [*range(1000, 23000), *[7] * 10900]
    began = time.process_time()
    assert verify.loops(ids) is False
    assert time.process_time() - began < 5
