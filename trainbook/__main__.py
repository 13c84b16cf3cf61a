"""`python -m trainbook` is the command line."""
from trainbook.cli import main

raise SystemExit(main())
