"""python -m experiments.gpu: the table of rows.py; or the name of the package that it lacks."""

import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")
try:
    from experiments.gpu.table import main, quieten
except ModuleNotFoundError as error:
    sys.exit(f"The measurements need the package {error.name}, which {sys.executable} does not have: pip install -e .")
quieten()
sys.exit(1 if main() else 0)
