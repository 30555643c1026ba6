"""How many drafts to verify, and whose: pure numpy, no vLLM, no torch, no clock."""
