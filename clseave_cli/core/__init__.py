"""The library under the commands: no terminal, no printing; frozen configs in, frozen results out."""
