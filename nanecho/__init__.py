"""nanecho: a small GPT and its trainer, which keeps its progress in castore. Importing it does not import torch."""
