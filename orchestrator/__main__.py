"""`python -m orchestrator`: the same as `kdcloud`, for where the command is not on the PATH."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
