"""TensorBoard with its orders from a file that only its owner can read: arguments are seen by everybody."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def words_of(orders: dict[str, object]) -> list[str]:
    """Its own arguments. Its data server would be a second process, with a port that asks for nothing."""
    return [
        "tensorboard", "--host", "127.0.0.1", "--logdir", str(orders["logdir"]), "--port", str(orders["port"]),
        "--path_prefix", str(orders["path"]), "--reload_interval", "5", "--reload_multifile", "true",
        "--load_fast", "false",
    ]  # fmt: skip


def main() -> None:
    from tensorboard import default, program

    board = program.TensorBoard(default.get_plugins())
    board.configure(argv=words_of(json.loads(Path(sys.argv[1]).read_text())))
    sys.exit(board.main())


if __name__ == "__main__":
    main()
