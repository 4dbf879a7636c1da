"""Tables, figures and pages of runs, from numbers alone: nothing here reads a file or knows of a network."""
