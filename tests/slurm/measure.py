"""How long does SkyPilot take around a run, with nothing beside it? `bash tests/slurm/run.sh --measure` prints it."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from itertools import cycle
from pathlib import Path

from tests.slurm.scenes import REHEARSAL, absences, is_over, reach, steps_done
from tests.slurm.table import LEAST_READINGS, LIMIT_S, percentile_95, sample
from tests.whole_runs import make_home

STAGE = REHEARSAL.splitlines()[-1]
CARDS = ("RTX3090", "A10G")  # in turn, so that no stage goes on on the machine of the one before


def main() -> None:
    threading.Thread(target=sample, daemon=True).start()
    folder = Path(tempfile.mkdtemp())
    from sky.client import sdk

    sdk.api_stop()
    first_step(folder / "cold", REHEARSAL, "without an API server")
    stages = [
        STAGE.replace("first", name).replace("rehearse", f"rehearse, gpus: [{gpu}]")
        for name, gpu in zip(("first", *(f"s{n}" for n in range(2, LEAST_READINGS + 1))), cycle(CARDS))
    ]
    recipe = REHEARSAL.replace(STAGE, "\n".join(stages)).replace("0.50 USD", "2 USD")
    readings = first_step(folder / "warm", recipe, "with a warm API server")
    print(f"COMMIT until absent from squeue, 95th percentile of {len(readings)}: {percentile_95(readings):.1f} s")
    print(f"  each: {sorted(readings)}")
    if len(readings) < LEAST_READINGS or percentile_95(readings) > LIMIT_S:
        sys.exit(f"{LEAST_READINGS} are needed within {LIMIT_S:.0f} s")


def first_step(folder: Path, recipe: str, how: str) -> list[float]:
    """Prints the time from the command to the first step. Returns how long each stage's machine outlived its result."""
    home = make_home(folder, recipe)
    began = time.monotonic()
    client = home.start("run", "recipe.yaml", "--yes")
    print(f"kdcloud run until its first step, {how}: {reach(home, client, lambda: steps_done(home)):.1f} s", flush=True)
    assert client.wait(timeout=1800) == 0, (folder / "client.log").read_text()
    print(f"  until its end: {time.monotonic() - began:.1f} s", flush=True)
    is_over(home)
    return absences(home)


if __name__ == "__main__":
    main()
