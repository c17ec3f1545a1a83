"""The command `diffusers-srepa`, one file per subcommand."""
