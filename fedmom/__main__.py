"""`python -m fedmom` is the command `fedmom`."""

from fedmom.cli import main

if __name__ == "__main__":
    main()
