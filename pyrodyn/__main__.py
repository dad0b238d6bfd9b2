"""``python -m pyrodyn`` is the command `pyrodyn`."""

from pyrodyn.cli import main

if __name__ == "__main__":
    main()
