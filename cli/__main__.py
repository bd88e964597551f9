"""`python -m cli`: the same as `pvt-serve`, from a checkout that is not installed."""

from cli.main import main

if __name__ == "__main__":
    main()
