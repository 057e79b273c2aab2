"""``python -m cleanfs``."""

from cleanfs.cli.commands import main

if __name__ == "__main__":
    main()
