"""How good are the pictures? The judge, the figures made of its findings, and their charts."""

import os

# Charts are files: no screen is needed, nor whatever backend a notebook has set for itself. Before
# anything imports matplotlib, as torchmetrics does.
os.environ["MPLBACKEND"] = "agg"
