"""Curation: from the masks that a model found to those that a training is to see."""
