"""Ask a question about a picture: ``python main.py --image car.jpg --prompt "What is this?"``."""

import sys

from engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
