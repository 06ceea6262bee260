"""`python -m clseave_cli`: the same as the `clseave` command (and what torchrun starts)."""

from clseave_cli.main import main

if __name__ == "__main__":
    main()
