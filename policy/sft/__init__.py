"""Supervised fine-tuning on demonstrations, through trl's trainer."""
