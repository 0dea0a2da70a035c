"""`python -m aajr_kernels` is the `aajr` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
