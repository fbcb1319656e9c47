"""``python -m sb3_agpo.zoo SCRIPT ...``: the scripts of RL Baselines3 Zoo, with AGPO among the algorithms."""

import sys

from sb3_agpo.zoo.scripts import main

# Workers of a vectorised environment import this file under another name, and must not run it.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
