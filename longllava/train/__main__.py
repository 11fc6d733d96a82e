"""python -m longllava.train CONFIG [key=value ...]"""

import sys

from longllava.errors import LongLLaVAError
from longllava.train import main

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m longllava.train CONFIG.yaml [preset=NAME] [key=value ...]")
    try:
        main(sys.argv[1], sys.argv[2:])
    except (LongLLaVAError, OSError) as error:  # a full disk, too
        sys.exit(f"longllava train: {error}")
    except KeyboardInterrupt:  # while a step runs it is saved first, with the same code
        sys.exit(130)
