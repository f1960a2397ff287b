"""Ask a question about a picture: ``python main.py --image car.jpg --prompt "What is this?"``."""

import sys

from engine.__main__ import start

if __name__ == "__main__":
    sys.exit(start())
