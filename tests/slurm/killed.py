"""A client that dies of SIGKILL the moment its ledger holds a certain entry.

python -m tests.slurm.killed sent run recipe.yaml --yes
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from orchestrator.cli import main
from orchestrator.ledger import Ledger


def dies_after(kind: str, method: str) -> Callable[..., Any]:
    """The ledger's own method, after which the process is gone when the entry was of this kind."""
    own = getattr(Ledger, method)

    def call(self: Ledger, *args: Any, **named: Any) -> Any:
        result = own(self, *args, **named)
        if kind == method or kind in [str(value) for value in (*args, *named.values()) if isinstance(value, str)]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


if __name__ == "__main__":
    wanted = sys.argv.pop(1)
    for name in ("reserve", "move", "note"):
        setattr(Ledger, name, dies_after(wanted, name))
    main()
