"""``python -m hpa`` is ``hpa``."""

from hpa.cli import main

if __name__ == "__main__":
    main()
