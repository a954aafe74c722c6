"""How many bytes does a label take, and how fast are labels read in training's order?

    python benchmarks/label_store.py [--rows 1000000] [--out benchmarks/results/label_store.json]

A store of --rows rows (k = 64, a vocabulary of 151,665, samples of 100 to 1,900 tokens, 64 a shard) in a temporary
folder. Batches of 8 samples are read in random order, as training does; the page cache is warm, since the store has
just been written and read once. Row contents are random: neither packing nor reading depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tasks.labels import Header, Labels, Sample, read_labels, shard_name, write_shard

K, VOCABULARY, SAMPLES_A_SHARD, BATCH, SECONDS = 64, 151_665, 64, 8, 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    default_threads = torch.get_num_threads()
    with TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        packing_s = build(folder, args.rows)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"built in {time.perf_counter() - started:.0f} s")
        started = time.perf_counter()
        labels = read_labels(folder)
        opened_s = time.perf_counter() - started
        rows = len(labels.completion_ids)
        speeds = {}
        read(labels, whole=True)  # every page is in the cache
        for threads in dict.fromkeys((1, default_threads)):
            torch.set_num_threads(threads)
            speeds[str(threads)] = read(labels)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "rows": rows,
        "samples": len(labels),
        "k": K,
        "vocabulary": VOCABULARY,
        "batch_samples": BATCH,
        "order": "random samples",
        "page_cache": "warm",
        "bytes_per_token": round(size / rows, 2),
        "open_s": round(opened_s, 3),
        "write_rows_per_s": round(rows / packing_s),
        "read_rows_per_s_by_torch_threads": speeds,
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def build(folder: Path, rows: int) -> float:
    """Writes the store; returns the seconds in write_shard."""
    gen = torch.Generator().manual_seed(0)
    header = Header("random", "0" * 64, "0" * 64, K, 2.0, VOCABULARY)
    written, spent, shard = 0, 0.0, 0
    while written < rows:
        samples = []
        while len(samples) < SAMPLES_A_SHARD and written < rows:
            n = int(torch.randint(100, 1901, (), generator=gen))
            ids = torch.randint(0, VOCABULARY, (n, K), generator=gen, dtype=torch.int32)
            logp = torch.rand(n, K, generator=gen) * -20
            key = f"{int(torch.randint(0, 2**62, (), generator=gen)):064x}"
            samples.append(Sample(key, torch.arange(150), ids[:, 0], ids, logp, logp[:, 0], logp[:, 1]))
            written += n
        started = time.perf_counter()
        write_shard(folder / shard_name(shard), header, samples)
        spent += time.perf_counter() - started
        shard += 1
    return spent


def read(labels: Labels, *, whole: bool = False) -> int:
    """Rows a second over SECONDS of random batches, or over all of them once."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    offsets = labels.completion_offsets
    rows, started = 0, time.perf_counter()
    while True:
        for picked in order.split(BATCH):
            wanted = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in picked])
            rows += len(labels.soft_rows(wanted)[0])
            if not whole and time.perf_counter() - started >= SECONDS:
                break
        if whole or time.perf_counter() - started >= SECONDS:
            return round(rows / (time.perf_counter() - started))


def cpu() -> str:
    """The processor's name, its model number where the name does not tell it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    told = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in told.items()}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


if __name__ == "__main__":
    main()
