"""Run the command line as `python -m regmix.cli`."""

from regmix.cli import main

main()
