"""`python -m metalora`: see cli.py."""

from .cli import main

main()
