import sys

from uspace_mm.cli import main

sys.exit(main())
