"""The command `python -m deqcore.tune`; what it does is in ``deqcore.sparse.tune``."""

from deqcore.sparse.tune import main

if __name__ == "__main__":
    main()
