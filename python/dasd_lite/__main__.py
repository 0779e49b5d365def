"""`python -m dasd_lite` is the `dasd-lite` command."""

from dasd_lite.cli import main

main()
