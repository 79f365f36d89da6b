"""``python -m launcher``."""

from launcher.cli import entry

if __name__ == "__main__":
    entry()
