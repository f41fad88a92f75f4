"""`python -m oversquash_lens.cli`."""

from oversquash_lens.cli import main

raise SystemExit(main())
