"""KDCLOUD_HOME and its config.yaml."""

from __future__ import annotations

import stat
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.config import DEFAULT_RATE, KEYS, Home, load_config, set_monthly_cap
from orchestrator.errors import UsageError
from orchestrator.money import Amount


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "kd")


def test_home_is_where_the_environment_says_else_in_the_users_folder(tmp_path: Path) -> None:
    assert Home.from_env({"KDCLOUD_HOME": str(tmp_path)}).root == tmp_path
    assert Home.from_env({"KDCLOUD_HOME": ""}).root == Path.home() / ".kdcloud"
    assert Home.from_env({}).root == Path.home() / ".kdcloud"


def test_the_first_load_makes_a_private_folder_and_an_owner_that_stays(home: Home) -> None:
    first = load_config(home)
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.config.stat().st_mode) == 0o600
    assert load_config(home) == first
    assert len(first.owner) == 6 and first.owner.isalnum()
    assert first.rate == DEFAULT_RATE and first.currency == "CNY" and first.monthly_cap is None
    assert first.bucket == f"file:{home.root}/bucket"
    assert [path.name for path in home.root.iterdir()] == ["config.yaml"]


def test_settings_are_read_and_a_missing_owner_is_added_below_them(home: Home) -> None:
    home.make()
    text = "# mine\ncurrency: usd\nusd_to_cny: 7.25\nrate_as_of: 2026-11-01\nmonthly_cap: 300 CNY"
    home.config.write_text(text)
    config = load_config(home)
    assert config.currency == "USD"
    assert (config.rate.usd_to_cny, config.rate.as_of) == (Decimal("7.25"), date(2026, 11, 1))
    assert config.monthly_cap == Amount(Decimal(300), "CNY")
    assert home.config.read_text() == f"{text}\nowner: {config.owner}\n"
    assert load_config(home) == config


def test_an_empty_file_gets_an_owner(home: Home) -> None:
    home.make()
    home.config.write_text("")
    owner = load_config(home).owner
    assert load_config(home).owner == owner


def test_everything_wrong_shows_at_once_with_its_line(home: Home) -> None:
    home.make()
    home.config.write_text(
        "curency: CNY\nowner: Bob\nusd_to_cny: -1\nrate_as_of: today\nmonthly_cap: 5\ncurrency: EUR\nowner: abc123\n"
    )
    with pytest.raises(UsageError) as caught:
        load_config(home)
    lines = caught.value.message.splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert "did you mean currency?" in lines[0]
    assert all(key in caught.value.hint for key in KEYS)


def test_a_second_value_for_a_key_is_refused(home: Home) -> None:
    home.make()
    home.config.write_text("currency: CNY\ncurrency: USD\n")
    with pytest.raises(UsageError, match=":2: currency: stands here twice"):
        load_config(home)


@pytest.mark.parametrize("text", ["currency: [CNY\n", "- a\n", "currency: {a: 1}\n"])
def test_a_file_of_another_form_is_refused_by_name(home: Home, text: str) -> None:
    home.make()
    home.config.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(home)
    assert str(home.config) in caught.value.message
    assert home.config.read_text() == text


def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        load_config(Home(tmp_path / "file" / "kd"))
    assert "KDCLOUD_HOME" in caught.value.hint


def test_two_clients_that_start_at_once_agree_on_the_owner(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes its file after this one has looked and before it writes."""

    def other_is_faster() -> str:
        home.config.write_text("owner: first1\n")
        return "second"

    monkeypatch.setattr("orchestrator.config.new_id", other_is_faster)
    assert load_config(home).owner == "first1"
    assert home.config.read_text() == "owner: first1\n"


def test_the_monthly_cap_is_set_changed_and_removed_and_every_other_line_stays(home: Home) -> None:
    home.make()
    home.config.write_text("# mine\nmonthly_cap: 300 CNY  # too much\nowner: abc123")
    set_monthly_cap(home, Amount(Decimal("12.5"), "USD"))
    assert load_config(home).monthly_cap == Amount(Decimal("12.5"), "USD")
    assert home.config.read_text() == "# mine\nowner: abc123\nmonthly_cap: 12.5 USD\n"
    set_monthly_cap(home, None)
    assert load_config(home).monthly_cap is None
    assert home.config.read_text() == "# mine\nowner: abc123\n"
    assert stat.S_IMODE(home.config.stat().st_mode) == 0o600


def test_a_new_home_takes_a_monthly_cap(home: Home) -> None:
    set_monthly_cap(home, Amount(Decimal(200), "CNY"))
    config = load_config(home)
    assert config.monthly_cap == Amount(Decimal(200), "CNY")
    set_monthly_cap(home, Amount(Decimal(100), "CNY"))
    assert load_config(home).owner == config.owner


@pytest.mark.parametrize(
    "text", ["{owner: abc123}\n", "{owner: abc123, monthly_cap: 3 CNY}\n", '"monthly_cap": 3 CNY\n']
)
def test_a_monthly_cap_is_never_written_into_what_it_would_break(home: Home, text: str) -> None:
    home.make()
    home.config.write_text(text)
    with pytest.raises(UsageError):
        set_monthly_cap(home, Amount(Decimal(200), "CNY") if "monthly" not in text else None)
    assert "200" not in home.config.read_text()


def test_the_bucket_for_every_run_can_be_set(home: Home) -> None:
    home.make()
    home.config.write_text("owner: abc123\nbucket: s3://mine/kd/\n")
    assert load_config(home).bucket == "s3://mine/kd"
    home.config.write_text("owner: abc123\nbucket: mine\n")
    with pytest.raises(UsageError, match="s3://name/prefix"):
        load_config(home)
