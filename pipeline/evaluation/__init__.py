"""Measuring models: against a teacher, against what people marked, and beside simpler methods. No Ray."""
