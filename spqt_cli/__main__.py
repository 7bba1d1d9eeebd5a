"""Entry point of the `spqt` command and of `python -m spqt_cli`."""

from spqt_cli.cli import main

if __name__ == "__main__":
    main()
