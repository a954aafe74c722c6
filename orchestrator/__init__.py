"""What runs on the user's machine: recipe, plan, run, ledger, report."""

__version__ = "0.1.0"
