"""Ask a question about a picture: ``python main.py --image car.jpg --prompt "What is this?"``."""

import sys

if __name__ == "__main__":
    try:
        from engine.__main__ import start

        sys.exit(start())
    except KeyboardInterrupt:  # before the program could say so itself
        sys.exit(130)
