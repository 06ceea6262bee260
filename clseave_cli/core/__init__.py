"""The library under the commands: frozen configs in, frozen results out; it never prints."""
