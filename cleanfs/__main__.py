"""``python -m cleanfs``."""

from cleanfs.cli import main

if __name__ == "__main__":
    main()
