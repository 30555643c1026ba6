"""Things to run: `serve`, `demo` and the training of the shipped pairs."""
