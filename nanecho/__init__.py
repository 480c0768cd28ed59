"""nanecho: a small GPT and its trainer, whose progress lives in castore. Importing it doesn't import torch."""
