"""One file per subcommand: flags → config → one core call → print."""
