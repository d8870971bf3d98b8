"""`python -m lazy_orbax`: the command line."""

from lazy_orbax.cli.main import main

raise SystemExit(main())
