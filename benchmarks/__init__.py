"""Measurements. Each command writes JSON that says what it ran on."""
