"""Confidences that mean what they say: pure numpy, no vLLM, no torch, no clock."""
