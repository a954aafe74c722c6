"""What must no test touch? The home folder, the AWS settings and the model hub of whoever runs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("kdcloud", deadline=None)  # shared machines are slow now and then; that is no failure
settings.load_profile("kdcloud")


@pytest.fixture(autouse=True)
def nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KDCLOUD_HOME of the test's own; no AWS setting and no model hub can be seen."""
    home = tmp_path_factory.mktemp("kdcloud-home")
    monkeypatch.setenv("KDCLOUD_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return home
