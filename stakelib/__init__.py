"""stakelib: from energy scenarios to a small language model that answers as nine energy stakeholders.

One folder per stage, in the order data flows: run, machine, models, scenarios, voices, dialogues, training, export,
evaluation. Importing this package loads no heavy library.
"""

import os

__version__ = "0.1.0"

# Before torch is loaded: idle threads wait a little, then sleep. By default they spin, and two programs on one laptop
# slow each other down 16 times; with 30,000 it was 4 times, and nothing was lost when alone (2 cores).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
