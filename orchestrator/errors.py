"""Errors a user can act on: what happened, what to do, and the exit code. Bugs keep their traceback."""

from __future__ import annotations


class KdcloudError(Exception):
    """Base: `message` is one sentence, `hint` what to do next, `exit_code` as the README lists them."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(KdcloudError):
    """Wrong recipe, wrong argument, unusable bucket or ledger: nothing was started."""

    exit_code = 2


class BudgetExceeded(KdcloudError):
    """It does not fit under the cap (nothing launched), or the cap was reached (all torn down)."""

    exit_code = 3


class NothingFits(KdcloudError):
    """No machine fits at any price, or none can be had."""

    exit_code = 4


class StageFailed(KdcloudError):
    """A stage failed or missed its deadline; machines are torn down, artefacts kept."""

    exit_code = 5


class DrillFailed(KdcloudError):
    """The fire drill found a schedule of faults that breaks the promise."""

    exit_code = 5


class TeardownUnconfirmed(KdcloudError):
    """A machine may still bill. Beats every other exit code."""

    exit_code = 6


class NotOwner(KdcloudError):
    """The run belongs to another client that is alive."""

    exit_code = 7
