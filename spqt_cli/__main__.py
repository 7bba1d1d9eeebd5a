"""`spqt` and `python -m spqt_cli`: loads the command line. Ctrl-C while it loads is no traceback either."""

import sys


def main() -> None:
    """Run the command line; it ends the process."""
    try:
        from spqt_cli.cli import main as entry
    except KeyboardInterrupt:
        sys.exit(130)
    entry.main()


if __name__ == "__main__":
    main()
