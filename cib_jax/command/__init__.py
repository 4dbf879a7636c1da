"""From a command line to one job."""
