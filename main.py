"""Ask a question about a picture: ``python main.py --image car.jpg --prompt "What is this?"``."""

import os
import sys

if __name__ == "__main__":
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        if here not in sys.path:  # python -P leaves it out
            sys.path.insert(0, here)
        from engine.__main__ import start

        sys.exit(start())
    except KeyboardInterrupt:  # before the program could say so itself
        sys.exit(130)
