"""Everything that knows vLLM's internals. Nothing else in the package imports them."""
