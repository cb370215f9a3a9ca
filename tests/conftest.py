"""What every test runs under: shapes checked, one thread, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch
from jaxtyping import install_import_hook

# The hook rewrites modules as they are imported, so it must stand before any import of mofo.
install_import_hook("mofo", "beartype.beartype")

# Sums split over threads differ in the last bits from machine to machine; golden numbers must not.
torch.set_num_threads(1)
