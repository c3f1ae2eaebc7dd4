"""stakelib: from energy scenarios to a small language model that answers as nine stakeholders.

One folder per stage, in the order data flows: run, machine, models, scenarios, voices, dialogues, training,
export, evaluation. Importing this package loads no heavy library.
"""

__version__ = "0.1.0"
