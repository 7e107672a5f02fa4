"""python -m stepdistill: the `stepdistill` command."""

from stepdistill.cli import entry

if __name__ == "__main__":
    entry()
