"""`python -m kelix_rt.cli` is the `kelix` command."""

from kelix_rt.cli import main

main()
