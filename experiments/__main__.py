"""``python -m experiments``."""

import sys

from experiments.lab.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # before JAX starts its threads

    from experiments.cli import main

    sys.exit(main())
