"""`python -m porter`."""

from porter.cli import entry

entry()
