"""From a command line to one command."""
