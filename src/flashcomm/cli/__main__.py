"""`python -m flashcomm.cli`, the command without its script."""

from flashcomm.cli import main

if __name__ == "__main__":
    main()
